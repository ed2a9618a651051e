"""The kinds of activation, each in a file of its own, and the setting `activation.kind` that chooses among them."""

from typing import Annotated

from pydantic import Field

from train.model.activations.batch_topk import BatchTopK
from train.model.activations.jumprelu import JumpReLU
from train.model.activations.relu import ReLU
from train.model.activations.topk import TopK

Activation = Annotated[BatchTopK | TopK | JumpReLU | ReLU, Field(discriminator="kind")]

__all__ = ["Activation", "BatchTopK", "JumpReLU", "ReLU", "TopK"]
