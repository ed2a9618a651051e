"""What a fake CUDA device is asked to do: operations, copies, and where the host waits for it."""

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tests.gpu.recording import Recording

PACKAGES = ("/train/", "/harvest/", "/shared/")
BETWEEN = "/triton_launch.py"
"""Every kernel is launched there: who asked for it is told instead."""


class DeviceFault(RuntimeError):
    """What CUDA, or torch on it, would refuse."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of torch, or one launch of a Triton kernel, on the device."""

    name: str
    bytes: int
    """Of its inputs and outputs, each once, and of a table that it indexes the rows: what it moves at least"""
    flops: int
    """Of matrix products; 0 for all others"""
    precision: str
    """Of a matrix product: `float32`, `tf32`, `bfloat16`; empty for all others"""
    where: str


@dataclass
class DeviceLog:
    """The record of one device machine; several fake devices share it."""

    ops: list[Op] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    """Where the host waited for the device: name of the operation @ line of the project"""
    syncs_beside: list[str] = field(default_factory=list)
    """The same of other threads than the main one"""
    copies: list[str] = field(default_factory=list)
    """To the device, `pinned` or `pageable`: @ line of the project"""
    fetches: list[str] = field(default_factory=list)
    """To the host, `pinned` or `pageable`: @ line of the project; one that is pageable is a wait, too"""
    faults: list[str] = field(default_factory=list)
    peak: int = 0
    """Most bytes that were held at once since it was set to 0; of an operation's own scratch memory nothing is known"""
    live: int = 0
    """Bytes that are held now"""
    held: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By address of what is held: its bytes, and how many tensors look at it"""
    free_bytes: int = 80 * 10**9
    """Of each device, as it says"""
    _of_thread: threading.local = field(default_factory=threading.local)
    _lock: Any = field(default_factory=threading.RLock)
    """Of what is held: a tensor may end while another is noted"""
    runs_kernels: bool = True
    """Whether Triton's kernels run in its interpreter, or are only counted"""

    recording: Recording | None = None
    """Of the CUDA graph that is being recorded"""

    @property
    def recording_here(self) -> Recording | None:
        """What this thread records: that of another one is not concerned."""
        return self.recording if self.recording and self.recording.here else None

    def hold(self, address: int, size: int) -> None:
        """Note a tensor of the device."""
        with self._lock:
            _, tensors = self.held.get(address, (0, 0))
            self.held[address] = size, tensors + 1
            self.live += 0 if tensors else size
            self.peak = max(self.peak, self.live)

    def release(self, address: int) -> None:
        """Note that a tensor is no more."""
        with self._lock:
            size, tensors = self.held.pop(address)
            if tensors > 1:
                self.held[address] = size, tensors - 1
            else:
                self.live -= size

    @property
    def current(self) -> int:
        """Number of the current device, of each thread its own."""
        return getattr(self._of_thread, "current", 0)

    @current.setter
    def current(self, number: int) -> None:
        self._of_thread.current = number

    def sync(self, name: str) -> None:
        """Note that the host waits; where a thread beside the main one does, training goes on."""
        if self.recording_here:
            raise self.fault(f"{name}: the host waits while a graph is recorded")
        beside = threading.current_thread() is not threading.main_thread()
        (self.syncs_beside if beside else self.syncs).append(f"{name} @ {caller()}")

    def copy(self, pinned: bool) -> None:
        """Note a copy from the host to the device."""
        if self.recording_here:
            raise self.fault("a copy from the host while a graph is recorded")
        self.copies.append(f"{'pinned' if pinned else 'pageable'} @ {caller()}")

    def fetch(self, pinned: bool) -> None:
        """Note a copy to the host."""
        if self.recording_here:
            raise self.fault("a copy to the host while a graph is recorded")
        self.fetches.append(f"{'pinned' if pinned else 'pageable'} @ {caller()}")
        if not pinned:
            self.sync("copy to the host")

    def op(self, name: str, size: int, flops: int = 0, precision: str = "") -> None:
        """Note an operation."""
        self.ops.append(Op(name, size, flops, precision, caller()))

    def fault(self, text: str) -> DeviceFault:
        """Note what the device refuses, and return the error to raise; noted since it might be caught."""
        self.faults.append(f"{text} @ {caller()}")
        return DeviceFault(self.faults[-1])

    def clear(self) -> None:
        """Forget everything but faults."""
        for part in (self.ops, self.syncs, self.syncs_beside, self.copies, self.fetches):
            part.clear()


def caller() -> str:
    """The innermost line of the project that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if not ("/site-packages/" in name or name.endswith(BETWEEN)) and any(part in name for part in PACKAGES):
            return f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
