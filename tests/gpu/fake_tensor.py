"""Tensors of a fake CUDA device: memory of the CPU, and the rules of CUDA.

A `FakeTensor` says that its device is `cuda:N`. Every operation on one is checked as CUDA would check it, noted in the
log, and computed on the CPU. What no operation of torch shows is not seen: a wait inside of one, of which those that
are known are listed in `WAITS`.
"""

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu.device_log import DeviceLog
from tests.gpu.recording import repeat

WAITS = {
    "_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "_linalg_eigh", "_linalg_svd", "linalg_lstsq", "linalg_inv_ex", "linalg_cholesky_ex",
}  # fmt: skip
"""Operations in which torch on CUDA waits: their result's shape, or an error, depends on what is in memory."""
COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
READS_ROWS = {"index", "index_select", "gather", "embedding"}
WRITES_ROWS = {"index_put_", "_index_put_impl_", "index_add_", "scatter_", "scatter_add_", "scatter_reduce_"}
SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "full_like", "clamp", "_foreach_mul_", "_fused_adam_"}
"""Operations, beside pointwise ones, that take a number on the CPU."""
RESHAPES = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_"}
"""What would change the shape of a tensor in place, which the wrapper would not show."""
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""What only takes memory: nothing runs on the device."""
FREE = {"detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size"}

log = DeviceLog()
pinned_memory: set[int] = set()
"""Addresses of memory that was asked for as pinned"""


def is_pinned(memory: Tensor) -> bool:
    """Whether memory of the CPU, or what it is a part of, was asked for as pinned."""
    return memory.untyped_storage().data_ptr() in pinned_memory


class FakeTensor(Tensor):
    """A tensor on a fake device; `memory` is what it holds."""

    memory: Tensor
    number: int

    @staticmethod
    def __new__(cls, memory: Tensor, number: int) -> "FakeTensor":
        """Wrap a tensor of the CPU, without a copy."""
        assert not isinstance(memory, FakeTensor)
        with torch.inference_mode(memory.is_inference()):  # a part of a tensor from outside of that mode is not of it
            made = Tensor._make_wrapper_subclass(
                cls,
                memory.size(),
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device=torch.device("cpu"),
            )
        made.memory, made.number = memory, number
        storage = memory.untyped_storage()
        log.hold(storage.data_ptr(), storage.nbytes())
        weakref.finalize(made, log.release, storage.data_ptr()).atexit = False
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return self.number

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, cuda:{self.number})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check, note and compute one operation of torch."""
    name = func.overloadpacket.__name__
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    fakes = [one for one in tensors if isinstance(one, FakeTensor)]
    number = _check(func, name, args, tensors)
    recording = log.recording_here
    if recording:
        if len(fakes) < len(tensors) and name != "where":  # whose numbers come as tensors, which CUDA fills itself
            raise log.fault(f"{name}: a number on cpu is read while a graph is recorded")
        recording.uses(map(memory_of, fakes), writes=func._schema.is_mutable)
    # A device that is asked for here is the tensor's own, which C++ takes for the CPU: `Tensor.to` was caught before.
    given = kwargs | ({"device": torch.device("cpu")} if kwargs.get("device") is not None else {})
    of_memory = tree_map(memory_of, args), tree_map(memory_of, given)
    out = func(*of_memory[0], **of_memory[1])
    if recording:
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        recording.makes(made)
        if not _is_view(func, name):
            recording.calls.append(repeat(made, lambda: func(*of_memory[0], **of_memory[1])))
    if name in EMPTY and not log.runs_kernels:
        out.zero_()  # nothing will be written there, and it may be an index
    _note(func, name, args, kwargs, tensors, out)

    def wrap(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        same = [known for known in tensors if memory_of(known) is one]  # what an operation in place returns
        return same[0] if same else FakeTensor(one, number)

    return tree_map(wrap, out) if fakes else out


def memory_of(one: Any) -> Any:
    """Return what a fake tensor holds; anything else as it is."""
    return one.memory if isinstance(one, FakeTensor) else one


def device_of(tensors: Iterable[Tensor]) -> int:
    """Return the number of the one device of all fake tensors; a fault where they are on several."""
    numbers = {one.number for one in tensors if isinstance(one, FakeTensor)}
    if len(numbers) > 1:
        raise log.fault(f"tensors on {', '.join(f'cuda:{n}' for n in sorted(numbers))}")
    return numbers.pop()


def _check(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    """Raise a `DeviceFault` where CUDA would refuse the devices of an operation; returns the number of the device."""
    host = [one for one in tensors if not isinstance(one, FakeTensor)]
    if name in RESHAPES:
        raise log.fault(f"{name}: the fake device cannot follow it")
    if name in COPIES:
        return next(one.number for one in tensors if isinstance(one, FakeTensor))
    number = device_of(tensors)
    if name in INDEXED:
        _check_index(name, args)
    elif any(one.dim() for one in host):
        shapes = [tuple(one.shape) for one in host]
        raise log.fault(f"{name}: expected all tensors on cuda:{number}, {shapes} are on cpu")
    elif host and not (torch.Tag.pointwise in func.tags or name in SCALARS or name.startswith("_foreach")):
        raise log.fault(f"{name}: expected all tensors on cuda:{number}, a number is on cpu")
    elif host and name.endswith("_") and args[0] is host[0]:
        raise log.fault(f"{name}: writes what is on cuda:{number} into a number on cpu")
    return number


def _check_index(name: str, args: tuple[Any, ...]) -> None:
    """As `_check`; what is indexed decides, and indices may be on the CPU, from where they are copied."""
    if not isinstance(args[0], FakeTensor):
        raise log.fault(f"{name}: a tensor on cpu is indexed by one on cuda")
    if name != "index" and not isinstance(args[2], FakeTensor) and args[2].dim():
        raise log.fault(f"{name}: values on cpu are put into a tensor on cuda")
    for index in args[1]:
        if index is not None and not isinstance(index, FakeTensor):
            log.copy(pinned=False)


def _note(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], out: Any) -> None:
    on_host = [not isinstance(one, FakeTensor) for one in tensors]
    if name in COPIES and any(on_host) and not all(on_host):
        at_once = name == "copy_" and not (len(args) > 2 and args[2])  # its third argument is `non_blocking`
        pinned = not at_once and is_pinned(next(one for one in tensors if not isinstance(one, FakeTensor)))
        (log.fetch if on_host[0] else log.copy)(pinned)
    by_mask = name in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
    if name in WAITS or by_mask:
        log.sync(name)
    if not _is_view(func, name):
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        written = [memory_of(one) for one in made]  # an `out` that an operation is given is not read
        read = [memory_of(one) for one in tensors]
        if "out" in kwargs:
            read = [one for one in read if not any(one is other for other in written)]
        size = _bytes(name, [one.nbytes for one in read], sum(one.nbytes for one in made))
        flops = _flops(name, args)
        log.op(name, size, flops, _precision(args[-1]) if flops else "")


def _is_view(func: Any, name: str) -> bool:
    """Whether an operation only looks at memory in another way, or takes some: nothing runs on the device."""
    aliases = [one.alias_info for one in func._schema.returns]
    return name in FREE | EMPTY or any(one is not None and not one.is_write for one in aliases)


def _bytes(name: str, inputs: list[int], made: int) -> int:
    """Return what is moved at least: inputs and outputs, each once, and of a table the rows that are asked for."""
    table, *others = inputs
    if name in READS_ROWS:
        return min(table, made) + sum(others) + made
    if name in WRITES_ROWS:  # read and written, as many of them as there are values
        return min(table + made, 2 * sum(others)) + sum(others)
    return sum(inputs) + made


def _flops(name: str, args: tuple[Any, ...]) -> int:
    if name not in ("mm", "addmm"):
        return 0
    left, right = args[-2:]
    return 2 * math.prod(left.shape) * int(right.shape[1])


def _precision(side: Tensor) -> str:
    """Name what a product of such matrices is computed in."""
    if side.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return str(side.dtype).removeprefix("torch.")
