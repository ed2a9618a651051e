"""Runs the model over a block of token windows and keeps what the hooks give, in the storage type.

On CPU every forward pass runs on one thread of its own and `workers` of them side by side: sums are then taken in one
order whatever the number of workers, and two passes on one core each beat one pass on two.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.blocks import Activations
from harvest.model import Model
from shared.errors import ProjectError, UserError
from shared.layout import STORAGE_DTYPES, StorageType


class Capture:
    """Several replicas of a model that share the batches of a block."""

    def __init__(self, models: list[Model], pool: ThreadPoolExecutor, device: str, storage: StorageType) -> None:
        self._pool, self._device, self._storage = pool, device, storage
        self._idle: SimpleQueue[Model] = SimpleQueue()
        for model in models:
            self._idle.put(model)

    def block(
        self, tokens: NDArray[np.int32], batch: int, widths: Mapping[str, int], done: Callable[[int], None]
    ) -> Activations:
        """The hooks' rows for windows `tokens` [S, T], `batch` windows per pass; `done` hears of tokens finished.

        Raises `ProjectError` on NaN or inf, and on values that the storage type cannot hold.
        """
        dtype = STORAGE_DTYPES[self._storage]
        rows = {name: np.empty((*tokens.shape, width), dtype) for name, width in widths.items()}
        starts = range(0, len(tokens), batch)
        futures = [self._pool.submit(self._batch, tokens[i : i + batch], i, rows) for i in starts]
        try:
            for start, future in zip(starts, futures, strict=True):
                future.result()
                done(tokens[start : start + batch].size)
        finally:
            _cancel(futures)
        return rows

    def _batch(self, tokens: NDArray[np.int32], start: int, rows: Activations) -> None:
        model = self._idle.get()
        try:
            found = model(torch.from_numpy(tokens.astype(np.int64)).to(self._device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(tokens)} windows per pass do not fit on the device; lower capture.batch_sequences"
            ) from error
        finally:
            self._idle.put(model)
        for name, values in found.items():
            rows[name][start : start + len(tokens)] = to_storage(values, self._storage, name, start)


@contextmanager
def open_capture(model: Model, workers: int, device: str, storage: StorageType) -> Iterator[Capture]:
    """A capture with `workers` threads on CPU (0: one per core this process may use), and one on CUDA."""
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        workers = 1
    workers = workers or len(os.sched_getaffinity(0))
    models = [model, *(model.replica() for _ in range(workers - 1))]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Capture(models, pool, device, storage)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def to_storage(values: Tensor, storage: StorageType, name: str, first: int) -> NDArray[Any]:
    """`values` [S, T, width] as stored: bfloat16 rounded to nearest even and given as its bits.

    `first` is the block's number of the first window, for the message of the `ProjectError` on values that are not
    finite, or not in the storage type.
    """
    _check_finite(values, name, first, "is")
    stored = values.to(getattr(torch, storage))
    _check_finite(stored, name, first, f"overflows to {storage}:", values)
    stored = stored.contiguous().cpu()
    return stored.view(torch.uint16).numpy() if storage == "bfloat16" else stored.numpy()


def _check_finite(values: Tensor, name: str, first: int, what: str, shown: Tensor | None = None) -> None:
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    sequence, position, dimension = torch.nonzero(bad)[0].tolist()
    value = float((values if shown is None else shown)[sequence, position, dimension])
    remedy = (
        "the model's dtype is too narrow, or its weights are damaged"
        if shown is None
        else ("choose --set store.storage=bfloat16")
    )
    raise ProjectError(
        f"{name}, sequence {first + sequence} of the block, position {position}: the value {what} {value:g}; {remedy}"
    )


def _cancel(futures: list[Future[None]]) -> None:
    for future in futures:
        future.cancel()
