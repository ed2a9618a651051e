"""What one training step computed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from train.model.sparse_latents import SparseLatents

if TYPE_CHECKING:
    from train.model.kernels.triton_step import Joined


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step computed: the loss with its terms, and what the metrics count."""

    terms: dict[str, Tensor]
    """Weighted terms; they add up to the loss."""
    errors: Tensor
    """[B, P] squared error of every row and prefix, detached"""
    target: Tensor
    """[B, O] normalised"""
    active: SparseLatents
    """Selected pairs with their latents' values, detached"""
    values: Tensor
    """The same values with their gradient"""
    threshold: Tensor
    """Smallest pre-activation of the batch that is selected and positive."""
    pre_acts: Tensor | None
    """[B, F] without gradient; none from a guarded search, unless they were wanted"""
    losses: tuple[Tensor, ...] = ()
    """What the loss is the sum of, each with a graph of its own. The first reaches every latent: its backward should
    come first, so that it writes gradients, and that of aux-k adds to the rows of dead latents alone."""
    joined: "Joined | None" = None
    """Where terms leave gradients that go with those of the first loss; none: each term's loss has its own"""

    @property
    def loss(self) -> Tensor:
        """The sum of `losses`."""
        return sum(self.losses[1:], self.losses[0])

    def with_terms(self, terms: dict[str, Tensor]) -> "StepOutput":
        """Return the same with further terms beside those of the loss."""
        return replace(self, terms=self.terms | {name: term.detach() for name, term in terms.items()})

    def detached(self) -> "StepOutput":
        """Return the same without what a backward needs."""
        return replace(self, values=self.values.detach(), losses=tuple(one.detach() for one in self.losses))
