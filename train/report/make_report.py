"""Makes a report of a run's newest checkpoint: `report.{html,md,json}`, and the browser of latents in `report/`."""

from pathlib import Path

import pyarrow as pa

from shared.console.progress import Progress
from shared.console.terminal import say
from shared.files import durable
from shared.splice_record import splice_of
from train.evaluation.evaluate import Evaluation, evaluate
from train.evaluation.linear_baseline import linear_map_fvu
from train.live.run_files import METRICS, Row
from train.probe.probe_record import probe_of
from train.redundancy.measure_redundancy import measure_redundancy
from train.report import families, gather, page
from train.report.browser import browser_files
from train.report.latent_labels import explained, merge_labels, read_labels
from train.report.latents import latents_table
from train.report.plots import figures
from train.report.report_record import Report
from train.report.verdict import verdict
from train.run.load_run import LoadedRun, samples_of
from train.run.metrics import Log, evaluation_of
from train.run.usage import usage_of
from train.samples.parquet import paths, read_contexts, read_latents
from train.samples.select import SamplesConfig

FOLDER = "report"
"""Of what lies beside the page."""
HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"


def make_report(loaded: LoadedRun, *, linear: bool = False, labels: Path | None = None) -> Report:
    """Write the report of a loaded checkpoint; samples that are not there are made first. Returns it.

    `linear`: also fit the best linear map on the training rows, for comparison. `labels`: a file of what people call
    latents, merged into those of the run. Raises `UserError` when that file is wrong, and `DiskFull`.
    """
    run, settings, rows = loaded.path, loaded.config.settings, loaded.rows
    metrics, d_sae = Log(run / METRICS).rows(), loaded.transcoder.d_sae
    said = merge_labels(run, loaded.step, d_sae, labels) if labels else read_labels(run)
    contexts, latents = paths(run, loaded.step)
    if not (contexts.is_file() and latents.is_file()):
        wanted = settings.samples if settings.samples.rows else SamplesConfig()
        samples_of(loaded, wanted).publish(run)
    sampled = read_contexts(contexts)
    with Progress("report", 5, "parts") as progress:
        progress.update(0, "neighbours")
        probed = probe_of(run, loaded.step, rows.store.request.digest)
        known, theirs = read_latents(latents), explained(run, loaded.step, rows.store.request.digest)
        named = [*theirs, *said.latents]  # what people say comes last, and counts
        table = latents_table(loaded.transcoder, rows, loaded.threshold, known, sampled, probed, named)
        progress.update(1, "held-out rows")
        held_out = _held_out(loaded, metrics)
        if linear and settings.source == "target":
            say("note: the best linear map of the targets to themselves leaves nothing: --linear says nothing here")
            linear = False
        fvu = linear_map_fvu(rows, loaded.threshold.device) if linear else None
        progress.update(2, "redundant latents")
        more = {
            "redundancy": measure_redundancy(loaded.transcoder, rows, loaded.threshold),
            "probe": probed.summary if probed else None,
        }
        progress.update(3, "the browser of latents")
        report = _report(loaded, table, sampled, metrics, held_out, fvu).model_copy(update=more)
        report = report.model_copy(update={"verdict": verdict(report)})
        beside = browser_files(report.run, rows.store, table, sampled)
        progress.update(4, "writing")
        _publish(run, report, beside)
        progress.update(5)
    return report


def plots(report: Report) -> dict[str, dict[str, str]]:
    """Return what a sync takes of a report: its plots as JSON of Plotly, and the verdict."""
    return {
        "plots": {name: str(one.to_json()) for name, one in figures(report).items()},
        "verdict": {check.name: f"{check.state}: {check.said}" for check in report.verdict},
    }


def _report(
    loaded: LoadedRun,
    table: pa.Table,
    contexts: pa.Table,
    metrics: list[Row],
    held_out: Evaluation,
    linear_fvu: float | None,
) -> Report:
    run, step, config = loaded.path, loaded.step, loaded.config
    spliced = splice_of(run, step, loaded.rows.store.request.digest)
    duplicates, settings = gather.duplicates(run, step, len(table)), config.settings
    rows, seconds = gather.trained(run, step) or (None, None)
    return Report(
        run=run.resolve().name,
        step=step,
        steps=settings.steps,
        trained_rows=rows,
        trained_seconds=seconds,
        decay_share=settings.optimizer.decay_share,
        d_sae=len(table),
        k=settings.activation.expected_l0,
        k_trained=settings.activation.expected_l0_at(step - 1),
        extensions=config.extensions,
        imported=config.imported.name if config.imported else None,
        verdict=[],
        held_out=held_out,
        linear_fvu=linear_fvu,
        splice=spliced,
        merged=gather.merged(metrics, step),
        training=gather.training_curves(metrics, step),
        timing=gather.timing_curves(run, step),
        monitor=gather.monitor_curves(run, step),
        density=gather.density(table),
        at_position_0=gather.at_position_0(table),
        nearest=gather.nearest(table, config.d_out),
        duplicates=duplicates,
        map=families.latent_map(table),
        refinements=families.refinements(table, loaded.rows.store),
        examples=gather.examples(contexts, table, duplicates),
        usage=usage_of(run),
        store=gather.store_facts(loaded.rows.store),
        settings=settings.model_dump(mode="json"),
        software=config.software,
    )


def _held_out(loaded: LoadedRun, metrics: list[Row]) -> Evaluation:
    """Return the evaluation that the run wrote at that step, or else measure it now."""
    if found := evaluation_of(metrics, loaded.path / METRICS, loaded.step):
        return found[1]
    return evaluate(loaded.transcoder, loaded.rows, loaded.threshold, loaded.config.settings.seed)


def _publish(run: Path, report: Report, beside: dict[str, bytes]) -> None:
    """Publish the folder first, whole: what the page leads to is there when the page is."""
    folder = run / FOLDER
    files = {HTML: page.html(report), MARKDOWN: page.markdown(report)}
    files[JSON] = durable.json_bytes(report.model_dump(mode="json"))
    durable.require_space(run, sum(map(len, [*beside.values(), *files.values()])), f"the report of {run}")
    if folder.exists():
        durable.remove_folder(folder)
    with durable.publish_folder(folder) as temporary:
        for name, data in beside.items():
            durable.publish_bytes(temporary / name, data)
    durable.publish_files({run / name: data for name, data in files.items()})
