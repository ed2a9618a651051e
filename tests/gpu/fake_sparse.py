"""Sparse matrices of a fake CUDA device, as far as a step uses them: the sampled product of two dense ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.gpu.fake_tensor import FakeTensor, device_of, log

_make, _sampled = torch.sparse_csr_tensor, torch.sparse.sampled_addmm


@dataclass(frozen=True)
class FakeCsr:
    """A matrix whose three tensors are on a fake device, which a tensor that wraps another cannot be."""

    matrix: Tensor
    """On CPU"""
    number: int

    def values(self) -> Tensor:
        """Return the values of all places."""
        return FakeTensor(self.matrix.values(), self.number)


def sparse_functions() -> Iterator[tuple[Any, str, Any]]:
    """What is replaced: the module, the name, and what by."""
    yield torch, "sparse_csr_tensor", sparse_csr_tensor
    yield torch.sparse, "sampled_addmm", sampled_addmm


def sparse_csr_tensor(*parts: Any, **options: Any) -> Any:
    """As `torch.sparse_csr_tensor`."""
    if not any(isinstance(one, FakeTensor) for one in parts):
        return _make(*parts, **options)
    if not all(isinstance(one, FakeTensor) for one in parts):
        raise log.fault("sparse_csr_tensor: some of its tensors are on cpu")
    if options.get("check_invariants", True):
        log.sync("sparse_csr_tensor: invariants")
    number = device_of(parts)
    return FakeCsr(_make(*(one.memory for one in parts), **options), number)


def sampled_addmm(pattern: Any, left: Tensor, right: Tensor, **numbers: float) -> Any:
    """As `torch.sparse.sampled_addmm`."""
    if not isinstance(pattern, FakeCsr):
        return _sampled(pattern, left, right, **numbers)
    if not (isinstance(left, FakeTensor) and isinstance(right, FakeTensor)):
        raise log.fault("sampled_addmm: a matrix is on cpu")
    if device_of((left, right)) != pattern.number:
        raise log.fault("sampled_addmm: tensors on several devices")
    sides = (one.detach().memory for one in (left, right))  # type: ignore[attr-defined]
    with torch.no_grad():
        found = _sampled(pattern.matrix, *sides, **numbers)
    count, width = found.values().numel(), left.shape[1]
    log.op("sampled_addmm", 4 * count * (2 * width + 1), 2 * count * width)
    return FakeCsr(found, pattern.number)
