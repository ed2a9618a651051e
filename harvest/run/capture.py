"""Runs the model over blocks of token windows and puts the rows that are stored straight to their permuted places.

On CPU every forward pass runs on one thread of its own and `workers` of them side by side: sums are then taken in one
order whatever the number of workers, and two passes on one core each beat one pass on two. The batches of the next
block start while the last ones of a block run and while it is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.llm.model import Model
from harvest.text.packing import Windows
from harvest.writer.blocks import BlockLayout, Buffers
from shared.errors import ProjectError
from shared.store.layout import STORAGE_DTYPES, Documents, StorageType


class Capture:
    """Several replicas of a model that share the batches of blocks."""

    def __init__(
        self, models: list[Model], pool: ThreadPoolExecutor, device: str, storage: StorageType, documents: Documents
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
        buffers: Buffers,
        done: Callable[[int], None],
        stop: Sequence[int] = (),
    ) -> list[Future[bool]]:
        """Start the passes of a block, `batch` windows each, which fill `buffers`; `done` hears of tokens finished.

        A future says whether its pass was made: none is begun when `stop` has a signal. It raises `ProjectError` on
        NaN or inf, on values that the storage type cannot hold, and on a batch that does not fit on the device.
        """

        def run(start: int) -> bool:
            if stop:
                return False
            end = min(start + batch, len(windows.tokens))
            places, rows = (torch.from_numpy(found) for found in layout.batch(start, end))

            def take(name: str, values: Tensor) -> None:
                stored = to_storage(values, self._storage, name, start)
                as_tensor(buffers[name]).index_copy_(0, places, stored.flatten(0, 1).index_select(0, rows))

            self._visit(windows.tokens[start:end], layout.positions[start:end], take)
            done(windows.tokens[start:end].size)
            return True

        return [self.pool.submit(run, start) for start in range(0, len(windows.tokens), batch)]

    def rows(self, windows: Windows, positions: NDArray[np.int64]) -> Buffers:
        """Return all rows [S * T, width] of some windows in one pass, by hook, in order."""
        found: Buffers = {}

        def take(name: str, values: Tensor) -> None:
            found[name] = as_array(to_storage(values, self._storage, name, 0).flatten(0, 1).clone())

        self._visit(windows.tokens, positions, take)
        return found

    def _visit(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int64], take: Callable[[str, Tensor], None]
    ) -> None:
        try:
            self.forward(tokens, positions, take)
        except torch.OutOfMemoryError as error:
            raise ProjectError(
                f"{len(tokens)} windows per pass no longer fit on the device, and the store's blocks are made with as "
                "many; free the device's memory and run the same command again"
            ) from error

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int64],
        take: Callable[[str, Tensor], None] = lambda _, __: None,
    ) -> None:
        """Run some windows; `take` is called with the name and the activations [S, T, width] of each hook.

        Raises `torch.OutOfMemoryError`, on CPU too.
        """
        ids, places = (torch.from_numpy(np.array(part, np.int64)).to(self._device) for part in (tokens, positions))
        model = self._idle.get()
        try:
            model.visit(ids, places if self._documents == "apart" else None, take)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error
        finally:
            self._idle.put(model)


def fitting_buffers(used: Buffers, widths: Mapping[str, int], rows: int, storage: StorageType) -> Buffers:
    """Return buffers with room for at least `rows` rows of each hook; `used` again, if it has that."""
    if used and all(len(buffer) >= rows for buffer in used.values()):
        return used
    return {name: np.empty((rows, width), STORAGE_DTYPES[storage]) for name, width in widths.items()}


@contextmanager
def open_capture(
    model: Model, workers: int, device: str, storage: StorageType, documents: Documents
) -> Iterator[Capture]:
    """Open a capture with `workers` threads on CPU, and one on CUDA."""
    if device.startswith("cuda"):
        workers = 1
    models = [model, *(model.replica() for _ in range(workers - 1))]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for new threads, too
    pool = ThreadPoolExecutor(workers, "forward", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Capture(models, pool, device, storage, documents)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def to_storage(values: Tensor, storage: StorageType, name: str, first: int) -> Tensor:
    """Return `values` [S, T, width] in the storage type, on CPU; bfloat16 rounds to nearest even.

    `first` is the block's number of the first window, for the message of the `ProjectError` on values that are not
    finite, or not in the storage type.
    """
    stored = values.to(getattr(torch, storage))
    if not torch.isfinite(stored.sum(dtype=torch.float32)):  # one pass; a sum of finite values may overflow, too
        _check_finite(values, values, name, first, "the value is")
        _check_finite(stored, values, name, first, f"{storage} cannot hold the value")
    return stored.cpu()


def as_tensor(rows: NDArray[np.generic]) -> Tensor:
    """Return stored rows as a tensor over the same memory."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor


def as_array(rows: Tensor) -> NDArray[np.generic]:
    """Return rows in the storage type as they are stored, over the same memory."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _check_finite(values: Tensor, shown: Tensor, name: str, first: int, what: str) -> None:
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    sequence, position, dimension = torch.nonzero(bad)[0].tolist()
    remedy = (
        "the model's dtype is too narrow, or its weights are damaged"
        if values is shown
        else "choose --set store.storage=bfloat16"
    )
    raise ProjectError(
        f"{name}, sequence {first + sequence} of the block, position {position}: {what} "
        f"{float(shown[sequence, position, dimension]):g}; {remedy}"
    )
