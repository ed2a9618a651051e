"""What is asked of a fake device while a CUDA graph is recorded, so that it can be asked again."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Recording:
    """What is asked of the device between the begin and the end of a capture."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self._thread = threading.get_ident()
        self._made: dict[int, Tensor] = {}
        """Memory that was taken meanwhile, by address"""
        self.outside: dict[int, Tensor] = {}
        """Memory from before that was read or written"""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Of what was written: the memory, and what it held"""

    @property
    def here(self) -> bool:
        """Whether this thread records: what others ask for is no part of it."""
        return threading.get_ident() == self._thread

    def uses(self, tensors: Iterable[Tensor], *, writes: bool) -> None:
        """Note memory that an operation is going to use, before it does."""
        for one in tensors:
            address = _address(one)
            if address not in self._made:
                self.outside.setdefault(address, one)
                if writes and address not in self._before:
                    whole = _whole(one)
                    self._before[address] = whole, whole.clone()

    def makes(self, tensors: Iterable[Tensor]) -> None:
        """Note memory that an operation has taken."""
        for one in tensors:
            if _address(one) not in self.outside:
                self._made.setdefault(_address(one), one)

    def put_back(self) -> None:
        """Undo what was written to memory from before."""
        for memory, held in self._before.values():
            memory.copy_(held)


def _address(one: Tensor) -> int:
    return one.untyped_storage().data_ptr()


def _whole(one: Tensor) -> Tensor:
    """Return all bytes of the memory of which `one` is a part."""
    return torch.empty(0, dtype=torch.uint8).set_(one.untyped_storage())


def repeat(tensors: list[Tensor], again: Callable[[], Any]) -> Callable[[], None]:
    """Return a call that makes `tensors` once more by `again`, and writes them where they are."""

    def call() -> None:
        with torch.no_grad():
            fresh = [one for one in tree_leaves(again()) if isinstance(one, Tensor)]
            for old, new in zip(tensors, fresh, strict=True):
                if _address(new) != _address(old):
                    old.copy_(new)

    return call
