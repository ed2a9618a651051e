"""Where the rows of a block lie until they are written, and what is known of them by then.

On CPU every pass puts its rows straight to their places in a buffer. On CUDA a pass leaves them on the device, in the
order of the windows. After a block's last pass they are put in the store's order there, measured there, and copied to
pinned memory of the host on a stream of their own, while the next block's passes run. No pass waits for the device.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harvest.run.stored_values import as_array, as_tensor, to_storage
from harvest.writer.blocks import BlockLayout, Buffers, Measured, Measures
from shared.errors import ProjectError
from shared.store.row_arrays import STORAGE_DTYPES, FloatType
from shared.store.statistics import moments_from_sums

Take = Callable[[str, Tensor], None]
"""Is called with the name and the activations [S, T, width] of each hook."""
_VALUES_AT_ONCE = 2**24
"""Of which moments are taken at once on the device: 128 MiB in float64."""


class BlockRows(Protocol):
    """The rows of one block after another."""

    buffers: Buffers
    """Rows in the order of the layout, once `wait` has returned."""
    measured: Measures
    """What was measured on the way: the moments and norms of a hook's rows in a stratum."""

    def begin(self, layout: BlockLayout, batch: int) -> None:
        """Make room for a block whose passes have `batch` windows."""

    def take(self, start: int, stop: int) -> Take:
        """Return what takes the activations of the pass over windows `start:stop`."""

    def end(self) -> None:
        """Send the block on its way to the host, after its last pass, in the thread of the passes."""

    def wait(self) -> list[int]:
        """Return when the buffers are filled: the first windows of passes with values that may not be finite."""


class HostRows:
    """Rows in memory of the host, which several threads fill. What is not finite is an error of its pass."""

    def __init__(self, widths: Mapping[str, int], storage: FloatType) -> None:
        self.buffers: Buffers = {}
        self.measured: Measures = {}
        self._widths, self._storage = widths, storage

    def begin(self, layout: BlockLayout, batch: int) -> None:
        """Make room for a block; buffers that are large enough are used again."""
        self._layout, rows = layout, len(layout.rows)
        if not self.buffers or any(len(buffer) < rows for buffer in self.buffers.values()):
            kind = STORAGE_DTYPES[self._storage]
            self.buffers = {name: np.empty((rows, width), kind) for name, width in self._widths.items()}

    def take(self, start: int, stop: int) -> Take:
        """Return what puts the activations of the pass over windows `start:stop` to their places."""
        places, rows = (torch.from_numpy(found) for found in self._layout.batch(start, stop))

        def take(name: str, values: Tensor) -> None:
            stored = to_storage(values, self._storage, name, start)
            as_tensor(self.buffers[name]).index_copy_(0, places, stored.flatten(0, 1).index_select(0, rows))

        return take

    def end(self) -> None:
        """Do nothing: the rows are where they belong."""

    def wait(self) -> list[int]:
        """Return at once: every pass was checked."""
        return []


class DeviceMemory:
    """The memory of a CUDA device that its blocks share: one being filled, and one on its way to the host."""

    def __init__(self, device: str, widths: Mapping[str, int], storage: FloatType, tokens: int, rows: int) -> None:
        """Take the memory for blocks of `tokens` tokens, of which `rows` are stored at most.

        Raises `ProjectError` where the device has not as much.
        """
        self.device, self.storage = device, storage
        kind = getattr(torch, storage)
        try:
            self.filling, self.leaving = (
                {name: torch.empty((count, width), dtype=kind, device=device) for name, width in widths.items()}
                for count in (tokens, rows)
            )
        except torch.OutOfMemoryError as error:
            size = (tokens + rows) * sum(widths.values()) * kind.itemsize
            raise ProjectError(
                f"the device has no room for the rows of two blocks, {size:,} bytes; free its memory and run the same "
                "command again, or make a store of smaller blocks, for example --set store.max_block_bytes="
                f"{size // 4}"
            ) from error
        self.stream = torch.cuda.Stream(device)
        self.left = torch.cuda.Event()
        """When `leaving` was last copied."""


class DeviceRows:
    """Rows that come from a CUDA device in one copy per block and hook. Two of these share a `DeviceMemory`.

    With `measure` their moments and norms are taken on the device, in float64.
    """

    def __init__(self, memory: DeviceMemory, *, measure: bool) -> None:
        self.buffers: Buffers = {}
        self.measured: Measures = {}
        self._memory, self._measure = memory, measure
        self._host: dict[str, Tensor] = {}

    def begin(self, layout: BlockLayout, batch: int) -> None:
        """Make room in pinned memory for a block; what is large enough is used again."""
        rows, names = len(layout.rows), self._memory.filling
        if not self._host or any(len(one) < rows for one in self._host.values()):
            self._host = {}  # given back before more is taken
            self._host = {name: _pinned((rows, one.shape[1]), one.dtype) for name, one in names.items()}
        self.buffers = {name: as_array(one[:rows]) for name, one in self._host.items()}
        self._layout, self._batch = layout, batch
        passes = -(-len(layout.positions) // batch)
        self._sums = torch.zeros((len(names), passes), device=self._memory.device)

    def take(self, start: int, stop: int) -> Take:
        """Return what puts the activations of the pass over windows `start:stop` in the order of the windows.

        Their sum says whether they may not be finite, and is not looked at before the block is.
        """
        context, names = self._layout.positions.shape[1], list(self._memory.filling)

        def take(name: str, values: Tensor) -> None:
            into = self._memory.filling[name][start * context : stop * context]
            into.copy_(values.flatten(0, 1))
            self._sums[names.index(name), start // self._batch] = into.sum(dtype=torch.float32)

        return take

    def end(self) -> None:
        """Order and measure the rows on the device; their copy to the host follows on a stream of its own."""
        memory, rows = self._memory, len(self._layout.rows)
        order = to_device(self._layout.rows, memory.device)
        now = torch.cuda.current_stream(memory.device)
        now.wait_event(memory.left)
        for name, found in memory.filling.items():
            torch.index_select(found, 0, order, out=memory.leaving[name][:rows])
        self._found = {
            (name, stratum): tuple(map(_to_host, sums_of(found[places])))
            for name, found in memory.leaving.items()
            for stratum, places in (self._layout.places.items() if self._measure else ())
        }
        self._doubts = _to_host(self._sums)
        ordered = torch.cuda.Event()
        ordered.record(now)
        with torch.cuda.stream(memory.stream):
            memory.stream.wait_event(ordered)
            for name, found in memory.leaving.items():
                self._host[name][:rows].copy_(found[:rows], non_blocking=True)
            self._arrived = memory.left = torch.cuda.Event()
            self._arrived.record(memory.stream)

    def wait(self) -> list[int]:
        """Return when the rows are on the host: the first windows of passes whose sum is not finite."""
        self._arrived.synchronize()
        self.measured = {place: _measured(*(one.numpy() for one in found)) for place, found in self._found.items()}
        doubtful = ~torch.isfinite(self._doubts).all(0)
        return [self._batch * number for number, wrong in enumerate(doubtful.tolist()) if wrong]


def sums_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what moments of `rows` [n, d] are made of, in float64: shift, first and second sums [d], squares [n].

    Sums are of differences to the shift, the mean of the first rows; `squares` are the squared norms.
    """
    n, d = rows.shape
    step = max(1, _VALUES_AT_ONCE // d)
    shift = rows[:step].double().mean(0)
    first, second = torch.zeros_like(shift), torch.zeros_like(shift)
    squares = torch.empty(n, dtype=torch.float64, device=rows.device)
    for low in range(0, n, step):
        values = rows[low : low + step].double()
        squares[low : low + step] = values.square().sum(1)
        values -= shift
        first += values.sum(0)
        second += values.square_().sum(0)
    return shift, first, second, squares


def _measured(
    shift: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64], squares: NDArray[np.float64]
) -> Measured:
    return Measured(moments_from_sums(shift, first, second, squares), np.sqrt(squares))


def to_device(array: NDArray[np.generic], device: str) -> Tensor:
    """Return an array as a tensor on a device, without a wait where that is CUDA."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor


def _to_host(values: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory: it is there when the stream has come this far."""
    host = _pinned(values.shape, values.dtype)
    return host.copy_(values, non_blocking=True)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise ProjectError(
            f"the system pins no {math.prod(shape) * dtype.itemsize:,} bytes more of the host's memory, which rows are "
            "copied to; committed blocks stay: give the process more memory, or raise its limit of locked memory "
            "(ulimit -l), and run the same command again"
        ) from error
