"""What every form of the sparse half of a step can do: selection, and differentiable operations on triples.

With k of d_sae latents active, decoding and every gradient cost the active pairs. Tests compare the forms: `Dense` is
the mathematics as it is written, the reference; `Plain` is torch alone, on any device; `Compiled` is for CPU, on the
loops of `numba_loops`; `Triton` is for CUDA, as is `Matmul`, by products of whole matrices.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from train.model.sparse_latents import SparseLatents

Kernels = Literal["compiled", "triton", "matmul", "plain", "dense"]


class Groups(NamedTuple):
    """The Matryoshka groups of a loss: prefix p holds the latents of groups 0 to p."""

    of_latent: Tensor
    """[F] int64: the group of each latent; rises with the latent"""
    prefixes: int
    """As many as groups."""
    weight: Tensor | float
    """What a squared error weighs in the loss: one number, or one for each prefix, [P]."""
    sizes: tuple[int, ...] = ()
    """Latents of each prefix, for forms that cut matrices by them."""


class SparseOps(ABC):
    """The operations of a step whose cost is that of the selected pairs. They hold no state."""

    keeps_guess: ClassVar[bool] = False
    """Whether `batch_topk` leaves the guess for the next step in the place of its own"""

    @abstractmethod
    def batch_topk(
        self,
        pre_acts: Tensor,  # [B, F]
        n: int,
        guess: Tensor,  # scalar
    ) -> tuple[SparseLatents, Tensor]:
        """Select the `n` largest of the whole batch (BatchTopK, Bussmann et al. 2024).

        Returns them, and the smallest positive of them, or 0. `guess`, somewhat below the threshold of the step before,
        only saves time, where it is used. Which of several equal to the smallest are kept is the form's choice.
        """

    @abstractmethod
    def row_topk(
        self,
        pre_acts: Tensor,  # [B, F]
        k: int,
        among: Tensor | None = None,  # [F] bool
        each: int = 1,
    ) -> SparseLatents:
        """Select the `k` largest of every row (Gao et al. 2024), negative ones too.

        Of the latents `among`, if given: one for every `each` of them, rounded up, and at most `k`. When that is less
        than `k`, some that are not `among` them may follow.
        """

    @abstractmethod
    def above(
        self,
        pre_acts: Tensor,  # [B, F]
        thresholds: Tensor,  # [F]
    ) -> SparseLatents:
        """Select every pre-activation strictly above its latent's threshold."""

    @abstractmethod
    def encode(
        self,
        x: Tensor,  # [B, D] without gradient
        W_enc: Tensor,  # [D, F]
        b_enc: Tensor,  # [F]
        active: SparseLatents,
        *,
        again: bool = False,
    ) -> Tensor:  # [N]
        """Return the pre-activations of the pairs; gradients reach `W_enc` and `b_enc` through the pairs alone.

        They are `active.values`, if these have the type of `x`, and are else computed again. `again`: in any case,
        since the values are of a product in TF32, which has that type.
        """

    @abstractmethod
    def prefix_loss(
        self,
        values: Tensor,  # [N]
        W_dec: Tensor,  # [F, O]
        base: Tensor,  # [1, O] or [B, O]: what is added to every reconstruction
        y: Tensor,  # [B, O]
        active: SparseLatents,
        groups: Groups,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [], [B, P], [B, O]
        """Return the weighted squared error of all rows under all prefixes.

        And, without gradient, the squared error of every row under every prefix, and `y` less the last prefix's rows.
        """


def weighted(errors: Tensor, weight: Tensor | float) -> Tensor:  # [B, P] -> []
    """Return the sum of all errors, each `weight` times, or by prefix where that is [P]."""
    return errors.sum(0) @ weight if isinstance(weight, Tensor) and weight.dim() else weight * errors.sum()


def has_gradient(parameter: Tensor) -> bool:
    """Tell whether a term before has left a gradient to add to; if not, make room for one, not cleared."""
    if parameter.grad is not None:
        return True
    parameter.grad = torch.empty_like(parameter)
    return False
