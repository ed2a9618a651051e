"""The forms of the sparse half of a step by name; a form's libraries are imported when it is first asked for."""

from functools import cache

from train.model.kernels.base import Kernels, SparseOps


@cache
def sparse_ops(kernels: Kernels) -> SparseOps:
    """Return the operations of that name."""
    match kernels:
        case "compiled":
            from train.model.kernels.compiled import Compiled

            return Compiled()
        case "triton":
            from train.model.kernels.triton_kernels import Triton  # not there without CUDA

            return Triton()
        case "matmul":
            from train.model.kernels.matmul import Matmul

            return Matmul()
        case "plain":
            from train.model.kernels.plain import Plain

            return Plain()
        case _:
            from train.model.kernels.dense import Dense

            return Dense()
