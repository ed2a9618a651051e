"""Runs the model over blocks of token windows, and gives the rows to what keeps them (`harvest/run/block_rows.py`).

On CPU every forward pass runs on one thread of its own and `workers` of them side by side: sums are then taken in one
order whatever the number of workers, and two passes on one core each beat one pass on two. The batches of the next
block start while the last ones of a block run and while it is written.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.llm.model import Model
from harvest.run.block_rows import BlockRows, to_device
from harvest.run.stored_values import as_array, as_tensor, to_storage
from harvest.text.packing import Windows
from harvest.writer.blocks import BlockLayout, Buffers
from shared.errors import ProjectError
from shared.store.layout import Documents
from shared.store.row_arrays import FloatType


class Capture:
    """Several replicas of a model that share the batches of blocks."""

    def __init__(
        self, models: list[Model], pool: ThreadPoolExecutor, device: str, storage: FloatType, documents: Documents
    ) -> None:
        self.pool, self._device, self._storage, self._documents = pool, device, storage, documents
        self._idle: SimpleQueue[Model] = SimpleQueue()
        for model in models:
            self._idle.put(model)

    def fitting_batch(self, windows: Windows, positions: NDArray[np.int64], most: int) -> int:
        """Find the most windows per pass that fit on the device, rounding of rows included: `most`, or half, and so on.

        Raises `ProjectError` when a single one does not.
        """

        def take(name: str, values: Tensor) -> None:
            to_storage(values, self._storage, name, 0)

        while True:
            try:
                self.forward(windows.tokens[:most], positions[:most], take)
                return most
            except torch.OutOfMemoryError as error:
                if most == 1:
                    raise ProjectError(
                        f"a single window of {windows.tokens.shape[1]} tokens does not fit on the device; lower "
                        "windows.context_size, or choose --set model.dtype=bfloat16"
                    ) from error
            most //= 2
            if self._device.startswith("cuda"):
                torch.cuda.empty_cache()

    def submit(
        self,
        windows: Windows,
        layout: BlockLayout,
        batch: int,
        rows: BlockRows,
        done: Callable[[int], None],
        stop: Sequence[int] = (),
    ) -> list[Future[bool]]:
        """Start the passes of a block, `batch` windows each, which fill `rows`; `done` hears of tokens finished.

        A future says whether its pass was made: none is begun when `stop` has a signal. It raises `ProjectError` on
        NaN or inf, on values that the storage type cannot hold, and on a batch that does not fit on the device.
        """
        rows.begin(layout, batch)

        def run(start: int) -> bool:
            if stop:
                return False
            end = min(start + batch, len(windows.tokens))
            with _fitting(end - start):
                self.forward(windows.tokens[start:end], layout.positions[start:end], rows.take(start, end))
                if end == len(windows.tokens):
                    rows.end()
            done(windows.tokens[start:end].size)
            return True

        return [self.pool.submit(run, start) for start in range(0, len(windows.tokens), batch)]

    def settle(self, windows: Windows, layout: BlockLayout, batch: int, rows: BlockRows) -> None:
        """Wait for the rows of a block whose passes are made.

        Passes with values that may not be finite are made again, and looked at value by value. Raises `ProjectError`
        as a pass does.
        """
        for start in rows.wait():
            end = min(start + batch, len(windows.tokens))
            part = Windows(*(one[start:end] for one in windows))
            self.pool.submit(self.rows, part, layout.positions[start:end], start).result()
            places, _ = layout.batch(start, end)
            if not all(as_tensor(found[places]).isfinite().all() for found in rows.buffers.values()):
                raise ProjectError(
                    f"the pass from window {start} of the block gave values that are not finite, and none when it was "
                    "made again: the device does not compute the same twice; run the same command again on another"
                )

    def rows(self, windows: Windows, positions: NDArray[np.int64], first: int = 0) -> Buffers:
        """Return all rows [S * T, width] of some windows in one pass, by hook, in order.

        `first` is the block's number of the first window, for the message on values that are not finite.
        """
        found: Buffers = {}

        def take(name: str, values: Tensor) -> None:
            found[name] = as_array(to_storage(values, self._storage, name, first).flatten(0, 1).clone())

        with _fitting(len(windows.tokens)):
            self.forward(windows.tokens, positions, take)
        return found

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int64],
        take: Callable[[str, Tensor], None] = lambda _, __: None,
    ) -> None:
        """Run some windows; `take` is called with the name and the activations [S, T, width] of each hook.

        Raises `torch.OutOfMemoryError`, on CPU too.
        """
        ids = to_device(np.array(tokens, np.int64), self._device)
        places = to_device(np.array(positions, np.int64), self._device) if self._documents == "apart" else None
        model = self._idle.get()
        try:
            model.visit(ids, places, take)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error
        finally:
            self._idle.put(model)


@contextmanager
def _fitting(windows: int) -> Iterator[None]:
    """Say in one line that a pass of so many windows, which fitted before, does not any more."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ProjectError(
            f"{windows} windows per pass no longer fit on the device, and the store's blocks are made with as many; "
            "committed blocks stay: free the device's memory and run the same command again"
        ) from error


@contextmanager
def open_capture(
    model: Model, workers: int, device: str, storage: FloatType, documents: Documents
) -> Iterator[Capture]:
    """Open a capture with `workers` threads on CPU, and one on CUDA."""
    workers = 1 if device.startswith("cuda") else workers
    models = [model, *(model.replica() for _ in range(workers - 1))]
    before = torch.get_num_threads()
    _prepare_thread(device)  # the number of threads is that of new ones, too
    pool = ThreadPoolExecutor(workers, "forward", initializer=_prepare_thread, initargs=(device,))
    try:
        yield Capture(models, pool, device, storage, documents)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _prepare_thread(device: str) -> None:
    """Let this thread compute alone, and pin memory for its own device: pinned for another it takes memory there."""
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
