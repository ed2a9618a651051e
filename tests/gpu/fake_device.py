"""A machine with fake CUDA devices: `with fake_cuda() as log:` and torch finds them.

What is replaced is what asks for a device, and what moves to one or from one. Streams and events do nothing: all that
is asked for is done at once, so that no race can be seen here.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from tests.gpu.device_log import DeviceLog
from tests.gpu.fake_graph import FakeGraph, capture
from tests.gpu.fake_sparse import sparse_functions
from tests.gpu.fake_tensor import FakeTensor, device_of, is_pinned, log, memory_of, pinned_memory
from tests.gpu.kernel_bytes import moved
from tests.gpu.recording import repeat

FACTORIES = ("zeros", "ones", "empty", "full", "arange", "tensor", "as_tensor", "randn", "rand", "randint", "randperm",
             "eye", "linspace", "scalar_tensor")  # fmt: skip
_to, _numpy, _tolist = Tensor.to, Tensor.numpy, Tensor.tolist


@contextmanager
def fake_cuda(devices: int = 2) -> Iterator[DeviceLog]:
    """Give torch so many CUDA devices; yields what they are asked to do, from nothing on."""
    log.clear()
    log.faults.clear()
    log.current, log.runs_kernels, log.free_bytes = 0, True, 80 * 10**9
    _device_constructors()  # torch keeps this list when it is first asked for: it must not hold what is put in place
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's tensors become others when it moves
    with ExitStack() as stack:
        for owner, name, made in _replacements(devices):
            stack.enter_context(patch.object(owner, name, made, create=True))
        try:
            yield log
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _replacements(devices: int) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced: the module or class, the name, and what by."""
    for name in FACTORIES:
        yield torch, name, _factory(getattr(torch, name))
    for name, method in {"to": to, "cpu": cpu, "numpy": numpy, "tolist": tolist}.items():
        yield Tensor, name, method
    yield Tensor, "cuda", lambda tensor, device=None, **kwargs: to(tensor, device or "cuda", **kwargs)
    yield Tensor, "pin_memory", pin
    yield Tensor, "record_stream", lambda tensor, stream: None
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: log.current,
        "mem_get_info": lambda device=None: (log.free_bytes, log.free_bytes),
        "get_device_name": lambda device=None: "fake",
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: log.sync("synchronize"),
        "device_of": lambda tensor: current(tensor.number if isinstance(tensor, FakeTensor) else log.current),
        "device": lambda device: current(_number(torch.device(device))),
        "set_device": lambda device: setattr(log, "current", _number(torch.device(device))),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: current(stream.number),
        "current_stream": lambda device=None: _Stream(device),
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: setattr(log, "peak", log.live),
        "max_memory_allocated": lambda device=None: log.peak,
    }
    for name, made in cuda.items():
        yield torch.cuda, name, made
    yield from sparse_functions()
    yield torch, "_has_compatible_shallow_copy_type", _alike
    yield torch._C, "_group_tensors_by_device_and_dtype", _group(torch._C._group_tensors_by_device_and_dtype)
    yield from _triton()


def _alike(input: Tensor, from_: Tensor) -> bool:
    """As `torch._has_compatible_shallow_copy_type`, with its names: torch's compiler compares the signatures."""
    return isinstance(input, FakeTensor) == isinstance(from_, FakeTensor)


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that makes tensors on any device."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        is_to_pin = kwargs.pop("pin_memory", False)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else torch.device("cpu")
        if device.type != "cuda":
            out = make(*args, **kwargs)
            if is_to_pin:
                pinned_memory.add(out.untyped_storage().data_ptr())
            return out
        out = make(*args, **kwargs | {"device": "cpu"})
        if make.__name__ in ("tensor", "as_tensor"):
            log.copy(pinned=False)
        if recording := log.recording_here:
            recording.makes([out])
        if make.__name__ != "empty":
            log.op(make.__name__, out.nbytes)
            if recording:
                recording.calls.append(repeat([out], lambda: make(*args, **kwargs | {"device": "cpu"})))
        elif not log.runs_kernels:
            out.zero_()
        return FakeTensor(out, _number(device))

    return made


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `Tensor.to`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for one in args:
        if isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, str | torch.device):
            device = one
        elif isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
    copy: dict[str, Any] = {"copy": True} if kwargs.get("copy") else {}
    if device is None or (target := _full(torch.device(device))) == tensor.device:
        return _to(tensor, dtype or tensor.dtype, **copy)
    moved = _Move.apply(tensor, target, bool(kwargs.get("non_blocking")))
    return moved if dtype in (None, moved.dtype) else _to(moved, dtype)


def cpu(tensor: Tensor, *_: object, **__: object) -> Tensor:
    """As `Tensor.cpu`."""
    return to(tensor, "cpu")


def pin(tensor: Tensor) -> Tensor:
    """As `Tensor.pin_memory`."""
    made = tensor.clone()
    pinned_memory.add(made.untyped_storage().data_ptr())
    return made


def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `Tensor.numpy`."""
    if isinstance(tensor, FakeTensor):
        raise log.fault("numpy() of a tensor on cuda")
    return _numpy(tensor, *args, **kwargs)


def tolist(tensor: Tensor) -> Any:
    """As `Tensor.tolist`."""
    if isinstance(tensor, FakeTensor):
        log.sync("tolist")
    return _tolist(memory_of(tensor))


class _Move(torch.autograd.Function):
    """A copy to another device, whose gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.device = tensor.device
        memory = memory_of(tensor.detach())
        if device.type == "cpu":
            log.fetch(pinned=False)
            return memory.clone(memory_format=torch.preserve_format)
        if not isinstance(tensor, FakeTensor):
            log.copy(non_blocking and is_pinned(memory))
        return FakeTensor(memory.clone(memory_format=torch.preserve_format), _number(device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Move.apply(grads[0], ctx.device, False), None, None


def _number(device: torch.device) -> int:
    return log.current if device.index is None else device.index


def _full(device: torch.device) -> torch.device:
    return torch.device("cuda", _number(device)) if device.type == "cuda" else device


class _Stream:
    def __init__(self, device: Any = None, *_: object, **__: object) -> None:
        self.number = log.current if device is None else _number(torch.device(device))

    def wait_event(self, event: "_Event") -> None:
        """Nothing to wait for."""


class _Event:
    def __init__(self, *_: object, **__: object) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        """Everything before it is done."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        """Return the milliseconds from here to `end`, on the host's clock."""
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        """Note that the host waits: nothing is left to wait for here."""
        log.sync("event")


@contextmanager
def current(number: int) -> Iterator[None]:
    """Make a device the current one."""
    before, log.current = log.current, number
    try:
        yield
    finally:
        log.current = before


def _group(group: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's grouping of tensors by device, which asks C++ and so does not know of fake ones."""

    def grouped(lists: Any, *args: Any) -> Any:
        fakes = [one for part in lists for one in part if isinstance(one, FakeTensor)]
        device = torch.device("cuda", device_of(fakes)) if fakes else None
        return {(device or of, dtype): found for (of, dtype), found in group(lists, *args).items()}

    return grouped


def _triton() -> Iterator[tuple[Any, str, Any]]:
    """Replace the launch of Triton's interpreter, where there is Triton."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [one for one in args if isinstance(one, Tensor)]
        if not any(isinstance(one, FakeTensor) for one in tensors):
            return run(self, *args, **kwargs)
        if not all(isinstance(one, FakeTensor) for one in tensors):
            raise log.fault(f"{self.fn.__name__}: a tensor on cpu is given to a Triton kernel")
        if (number := device_of(tensors)) != log.current:
            raise log.fault(f"{self.fn.__name__}: tensors on cuda:{number}, launched on cuda:{log.current}")
        given = [memory_of(one.detach()) if isinstance(one, Tensor) else one for one in args]
        named = dict(zip(self.arg_names, given, strict=False)) | kwargs
        log.op(f"triton {self.fn.__name__}", moved(self.fn.__name__, named))
        if log.runs_kernels:
            if recording := log.recording_here:
                recording.uses((one for one in given if isinstance(one, Tensor)), writes=True)
                recording.calls.append(lambda: run(self, *given, **kwargs))
            run(self, *given, **kwargs)

    yield GridExecutor, "__call__", launch
