"""The latents of a run's transcoder that are active on the tokens of a prompt."""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from harvest.commands.repair import own_model
from harvest.llm.model import load_model
from harvest.splice.replacements import of_run, open_run, read_replacement
from harvest.text.tokenizer_files import load_tokenizer
from shared.console.terminal import PlainConsole
from shared.errors import UserError

_PROMOTED = 5
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
    promoted: list[list[str]] | None
    """Of each of them, the tokens whose logits it raises most; none: not known."""


def encode_prompt(
    run: Path, prompt: str, *, transcoder: Path | None, step: int | None, top: int, model: str | None
) -> list[TokenLatents]:
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
    best = [row.topk(min(top, int((row != 0).sum()))) for row in latents]
    shown = sorted({i for one in best for i in one.indices.tolist()})
    raised = replacement.promoted(shown, _PROMOTED) if replacement.promoted and shown else None
    names = raised and {i: [tokenizer.decode([one]) for one in row] for i, row in zip(shown, raised, strict=True)}
    return [
        TokenLatents(
            position=i,
            token=token,
            text=tokenizer.decode([token]),
            active=int((latents[i] != 0).sum()),
            latents=(indices := best[i].indices.tolist()),
            values=best[i].values.tolist(),
            promoted=[names[latent] for latent in indices] if names else None,
        )
        for i, token in enumerate(ids)
    ]


def show(found: list[TokenLatents]) -> None:
    """Print a line per token, and then one per latent with the tokens that it promotes."""
    table = Table("position", "token", "active", "latent: value, the strongest first")
    for one in found:
        pairs = "  ".join(f"{i}: {value:.3g}" for i, value in zip(one.latents, one.values, strict=True))
        table.add_row(str(one.position), repr(one.text), f"{one.active:,}", pairs)
    console = PlainConsole()
    console.print(table)
    names = {i: words for one in found for i, words in zip(one.latents, one.promoted or [], strict=False)}
    if names:
        promoted = Table("latent", "tokens that it promotes most")
        for i in sorted(names):
            promoted.add_row(str(i), " ".join(map(repr, names[i])))
        console.print(promoted)
