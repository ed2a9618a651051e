"""CUDA graphs of a fake device: what is asked for while a step is recorded, and its repetition on the same memory.

As on CUDA, recording changes nothing: what was written is put back. A replay makes every operation again, on the
tensors and numbers of that time, and writes where they wrote; so what the host decides anew at each step, or keeps in a
new tensor, is not followed. Refused are waits of the host and copies between it and the device, and a replay that reads
memory which was given back since.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.gpu.device_log import Op
from tests.gpu.fake_tensor import log
from tests.gpu.recording import Recording


class FakeGraph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._recording: Recording | None = None
        self.kernels: list[Op] = []
        """What a replay does on the device."""

    def record(self) -> Recording:
        """Begin to record."""
        self._recording = Recording()
        return self._recording

    def replay(self) -> None:
        """Make all operations again: one launch for the host."""
        assert self._recording
        if any(address and address not in log.held for address in self._recording.outside):
            raise log.fault("a graph reads memory that was given back")
        log.op("graph", sum(op.bytes for op in self.kernels))
        for call in self._recording.calls:
            call()


@contextmanager
def capture(
    graph: FakeGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """As `torch.cuda.graph`."""
    if capture_error_mode != "thread_local":
        raise log.fault("a graph is recorded in a way that stops the threads which copy rows")
    log.sync("capture")
    launched = len(log.ops)
    log.recording = recording = graph.record()
    try:
        yield
    finally:
        log.recording = None
        graph.kernels = log.ops[launched:]
        del log.ops[launched:]  # they were not launched
        recording.put_back()
