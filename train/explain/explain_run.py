"""Opens a run, tells what would be sent about it, and has its latents labelled."""

from pathlib import Path

from shared.console.terminal import say, show_text
from shared.store.store import Local
from train.explain.explain_latents import Labelled, Scope, explain_latents, plan
from train.explain.explanation_record import Asked, earlier
from train.explain.server import Server
from train.locked_run import locked_run


def explain(
    run: Path | str,
    server: Server,
    scope: Scope,
    *,
    parallel: int = 4,
    store: Path | None = None,
    local: Local | None = None,
    step: int | None = None,
    dry_run: bool = False,
) -> Labelled | None:
    """Label latents of a checkpoint of `run`, whose samples must be there; appends to `explanations.jsonl`.

    `dry_run`: send and write nothing, and print what would be sent. Raises `UserError` when the run, its samples or the
    server cannot be used as asked, `Stopped` when it ended early, with what is done kept, and `DiskFull`.
    """
    run = Path(run)
    with locked_run(run, store=store, local=local, step=step) as loaded:
        asked = Asked(
            store=loaded.rows.store.request.digest,
            step=loaded.step,
            model=server.model,
            temperature=server.temperature,
            seed=scope.seed,
        )
        done = earlier(run, asked)
        server.used += sum(one.tokens for one in done.values())
        planned, excerpts = plan(loaded, scope, done)
        say(
            f"{len(planned.latents):,} latents, {planned.questions:,} questions, about "
            f"{planned.characters // 3:,} tokens, for {server.model} at {server.url}"
        )
        if not dry_run:
            return explain_latents(run, asked, server, excerpts, planned.latents, parallel)
        if planned.first:
            show_text(f"{planned.first.system}\n\n{planned.first.user}")
        return None
