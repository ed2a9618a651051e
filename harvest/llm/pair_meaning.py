"""What a source and a target mean in a model, and whether the target follows from the source through the MLP."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harvest.llm.model import layers_needed, without_weights

MEANINGS = {
    "hook_resid_pre": "the residual stream before the layer",
    "hook_resid_mid": "the residual stream between attention and MLP, before the norm",
    "hook_resid_post": "the residual stream after the layer",
    "hook_attn_out": "what attention adds to the residual stream",
    "hook_mlp_out": "what the MLP adds to the residual stream, after the norm that follows it in some models",
    "mlp.hook_in": "what the MLP reads, after the norm with its gain and bias",
    "mlp.hook_out": "what the MLP gives, before any norm that follows it",
    "mlp.hook_pre": "the MLP's neurons before the nonlinearity",
    "mlp.hook_post": "the MLP's neurons after the nonlinearity",
    "ln2.hook_in": "the residual stream that the norm before the MLP reads",
    "ln2.hook_out": "what the norm before the MLP gives, with its gain and bias",
    "ln2.hook_normalized": "inside the norm before the MLP, before its gain and bias: not what the MLP reads "
    "(that is mlp.hook_in)",
    "ln1.hook_normalized": "inside the norm before attention, before its gain and bias",
    "ln2.hook_scale": "what the norm before the MLP divides by",
    "attn.hook_z": "the output of attention's heads, one after the other, before they are projected",
}
"""By the hook's name in its layer."""


class Paths(NamedTuple):
    """How a target comes from a source."""

    follows: bool
    """The source is among what the target is computed from."""
    alone: bool
    """... and all that the model reads comes to the target by way of the source."""
    through_attention: bool
    """... attention lies between them, so that sources of earlier positions count."""
    through_mlp: bool
    """... an MLP lies between them."""

    def sentence(self) -> str:
        """Say it, and what it means for a transcoder."""
        if not self.follows:
            return "the target does not follow from the source: nothing in it depends on the source"
        if self.through_attention:
            return (
                "the target does not follow from the source of its position alone: attention lies between them, and "
                "brings in other positions, which a transcoder does not see"
            )
        if not self.alone:
            return (
                "the target does not follow from the source alone: it also depends on what reaches it beside the "
                "source, such as the residual stream, which a transcoder does not see"
            )
        through = "through the MLP" if self.through_mlp else "and not through the MLP"
        return f"the target follows from the source of its position alone, {through}"


def explain_pair(folder: Path, source: str, target: str) -> list[str]:
    """Return lines on what two hooks mean and how the target comes from the source; no weights are loaded."""
    lines = [f"{role} {name}: {meaning(name)}" for role, name in (("source", source), ("target", target))]
    if source == target:
        return [*lines, "source and target are the same rows"]
    return [*lines, trace(folder, source, target).sentence()]


def meaning(name: str) -> str:
    """Say what a hook `blocks.<layer>.<name>` holds."""
    return MEANINGS.get(name.split(".", 2)[-1], "see transformer-lens for what it holds")


def trace(folder: Path, source: str, target: str) -> Paths:
    """Follow gradients from the target of a model without weights: they tell what it is computed from."""
    found: dict[str, Tensor] = {}

    def start(values: Tensor) -> Tensor:
        found["source"] = values.detach().requires_grad_()
        return found["source"]

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        return lambda values: found.setdefault(name, values)

    with without_weights(folder, [source, target]) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bridge says that a changed norm is computed in another way
        layers, known = range(layers_needed([source, target])), set(model.hook_names)
        between = {part: [f"blocks.{i}.{part}.hook_out" for i in layers] for part in ("attn", "mlp")}
        inner = [name for names in between.values() for name in names if name in known and name not in (source, target)]
        hooks = {name: keep(name) for name in inner}
        model.trace(torch.zeros(2, 4).long(), {source: start, **hooks, target: keep(target)})
        follows = depends(found[target], found["source"])
        lies = {
            part: any(
                depends(found[target], found[name]) and depends(found[name], found["source"])
                for name in names
                if name in found and found[name] is not found["source"]
            )
            for part, names in between.items()
        }
        return Paths(follows, not depends(found[target], model.embedding), lies["attn"], lies["mlp"])


def depends(result: Tensor, on: Tensor) -> bool:
    """Tell whether `result` is computed from `on`, or is it."""
    if result is on or not (result.requires_grad and on.requires_grad):
        return result is on
    ones = torch.ones_like(result)
    return torch.autograd.grad(result, on, ones, retain_graph=True, allow_unused=True)[0] is not None
