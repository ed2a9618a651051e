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
    return [_of_token(i, token, tokenizer.decode([token]), latents[i], top) for i, token in enumerate(ids)]


def show(found: list[TokenLatents]) -> None:
    """Print a line per token."""
    table = Table("position", "token", "active", "latent: value, the strongest first")
    for one in found:
        pairs = "  ".join(f"{i}: {value:.3g}" for i, value in zip(one.latents, one.values, strict=True))
        table.add_row(str(one.position), repr(one.text), f"{one.active:,}", pairs)
    PlainConsole().print(table)


def _of_token(position: int, token: int, text: str, latents: torch.Tensor, top: int) -> TokenLatents:
    active = int((latents != 0).sum())
    best = latents.topk(min(top, active))
    return TokenLatents(position, token, text, active, best.indices.tolist(), best.values.tolist())
