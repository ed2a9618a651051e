"""`python -m train explain RUN`: labels of latents from a language model on an OpenAI-compatible server."""

import json
from pathlib import Path

import click

import shared.command_line
from shared.console.terminal import Verbosity, show_path, verbosity
from shared.store.store import Local
from train.live.run_argument import RUN

MOST_TOKENS = 2_000_000


@click.command()
@click.argument("run", type=RUN)
@click.option("--model", required=True, help="The model's name on the server.")
@click.option(
    "--latents", type=shared.command_line.Numbers(), metavar="N,N-N", help="Latents to label; default: --count of them."
)
@click.option(
    "--count", type=click.IntRange(1), default=100, show_default=True, help="Number of latents, drawn at random."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=MOST_TOKENS,
    show_default=True,
    help="Maximum number of tokens for questions and answers, including earlier ones for this run.",
)
@click.option("--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Latents at a time.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed for drawing latents and contexts.",
)
@click.option("--store", type=shared.command_line.STORE, help="Where the store is now, if it was moved.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option(
    "--dry-run", is_flag=True, help="Send nothing; show how much would be sent where, and the first question."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@shared.command_line.local_options
def explain(
    run: Path,
    model: str,
    latents: list[int] | None,
    count: int,
    max_tokens: int,
    parallel: int,
    temperature: float,
    seed: int,
    store: Path | None,
    step: int | None,
    dry_run: bool,
    as_json: bool,
    local: Local | None,
) -> None:
    """Label latents with a language model on a server, and score the labels; writes explanations.jsonl into the run.

    Sends contexts of the run's samples, which are parts of the text that was harvested, to OPENAI_BASE_URL, with the
    key OPENAI_API_KEY. A label is scored by detection and fuzzing, on contexts that it was not made from. Finished
    labels are kept, and the same command continues. The next report shows the labels. Prints the file's path
    as its last line.
    """
    from train.explain.explain_latents import Scope
    from train.explain.explain_run import explain as explain_run
    from train.explain.explanation_record import FILE, summary
    from train.explain.server import Server

    found = explain_run(
        run,
        Server(model, temperature, max_tokens),
        Scope(latents, count, seed),
        parallel=parallel,
        store=store,
        local=local,
        step=step,
        dry_run=dry_run,
    )
    if not found:
        return
    if as_json:
        click.echo(json.dumps(summary(found.explanations), indent=2))
        return
    if verbosity() > Verbosity.QUIET:
        from train.explain.show import show

        show(found)
    show_path(run / FILE)
