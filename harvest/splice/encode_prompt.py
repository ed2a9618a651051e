"""The latents of a run's transcoder that are active on the tokens of a prompt."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from harvest.commands.repair import own_model
from harvest.llm.model import load_model
from harvest.splice.replacements import Replacement, Strongest, of_run, open_run, read_replacement
from harvest.text.tokenizer_files import load_tokenizer
from shared.console.terminal import PlainConsole, say
from shared.errors import UserError

_NAMED = 5
"""Tokens that are named of each latent."""


class TokenLatents(NamedTuple):
    """One token of a prompt."""

    position: int
    token: int
    text: str
    active: int
    """Latents that are active."""
    latents: list[int]
    """The strongest of them, falling."""
    values: list[float]


class LatentLabel(NamedTuple):
    """What a latent can be called by."""

    latent: int
    strongest: Strongest | None
    """Where in the run's samples it is strongest; none: it has no samples."""
    promotes: list[str] | None
    """The tokens whose logits it raises most; none: not known."""


class PromptLatents(NamedTuple):
    """The tokens of a prompt, and the latents that are listed with them."""

    tokens: list[TokenLatents]
    labels: list[LatentLabel]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        labels = [one._asdict() | {"strongest": one.strongest and one.strongest._asdict()} for one in self.labels]
        return {"tokens": [one._asdict() for one in self.tokens], "latents": labels}


def encode_prompt(
    run: Path, prompt: str, *, transcoder: Path | None, step: int | None, top: int, model: str | None
) -> PromptLatents:
    """Run the LLM on `prompt`, with BOS as in the store, and list each token's `top` strongest latents.

    Raises `UserError` when there is no such run, model or transcoder, or the prompt is empty or too long.
    """
    loaded = open_run(run, step)
    request = loaded.rows.store.request
    replacement = read_replacement(transcoder, loaded.rows.store) if transcoder else of_run(loaded)
    files = own_model(request, model)
    tokenizer = load_tokenizer(files.folder)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not 0 < len(ids) < request.context_size:
        raise UserError(f"--prompt has {len(ids):,} tokens, expected 1 to {request.context_size - 1:,}")
    ids = [tokenizer.bos_token_id, *ids] if request.bos else ids
    hook = request.source_hook if replacement.source == "source" else request.target_hook
    network = load_model(files.folder, request.model.dtype, request.model.device, [hook])
    rows = network(torch.tensor([ids], device=request.model.device))[hook][0].float().cpu()
    with torch.inference_mode():
        latents = replacement.encode(rows)
    tokens = [_token(i, token, latents[i], top, tokenizer) for i, token in enumerate(ids)]
    return PromptLatents(tokens, _labels(sorted({i for one in tokens for i in one.latents}), replacement, tokenizer))


def _token(position: int, token: int, latents: Tensor, top: int, tokenizer: Any) -> TokenLatents:
    active = int((latents != 0).sum())
    best = latents.topk(min(top, active))
    text = tokenizer.decode([token])
    return TokenLatents(position, token, text, active, best.indices.tolist(), best.values.tolist())


def _labels(latents: list[int], replacement: Replacement, tokenizer: Any) -> list[LatentLabel]:
    found = replacement.strongest(latents) if replacement.strongest and latents else {}
    if replacement.strongest and latents and not found:
        say("the run has no samples that say what its latents are strongest on; make them with: train samples RUN")
    raised = replacement.promoted(latents, _NAMED) if replacement.promoted and latents else None
    names = [[tokenizer.decode([one]) for one in row] for row in raised] if raised else [None] * len(latents)
    return [LatentLabel(latent, found.get(latent), words) for latent, words in zip(latents, names, strict=True)]


def show(found: PromptLatents) -> None:
    """Print a line per token, and then one per latent: where it is strongest, and which tokens it promotes."""
    table = Table("position", "token", "active", "latent: value, the strongest first")
    for one in found.tokens:
        pairs = "  ".join(f"{i}: {value:.3g}" for i, value in zip(one.latents, one.values, strict=True))
        table.add_row(str(one.position), repr(one.text), f"{one.active:,}", pairs)
    console = PlainConsole()
    console.print(table)
    labelled = [one for one in found.labels if one.strongest or one.promotes]
    if labelled:
        names = Table("latent", "strongest on", "its strongest sample", "promotes")
        for label in labelled:
            names.add_row(str(label.latent), *_where(label.strongest), _words(label.promotes or []))
        console.print(names)


def _where(found: Strongest | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    return _words(found.tokens[:_NAMED]), repr(f"{found.before}«{found.peak}»{found.after}")[1:-1]


def _words(words: list[str]) -> str:
    return " ".join(map(repr, words))
