"""The training run: batch -> loss -> backward -> step -> track -> log -> evaluate -> checkpoint."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import torch
from torch import Tensor

from shared.console.progress import Progress
from shared.console.terminal import say
from shared.errors import CorruptData, DiskFull, ProjectError, Stopped, warn
from shared.files import durable
from shared.store.store import Store
from shared.store.strata import POSITION_0
from train.data.staging import sent
from train.duplicates.diversity import Diversity
from train.duplicates.monitor import CorrelationMonitor
from train.duplicates.scans import Scans
from train.evaluation.evaluate import Evaluation, calibrate, evaluate
from train.evaluation.held_out import held_out_active
from train.live.run_files import CONFIG, Row
from train.live.training_panel import RunPanel
from train.model import checkpoint
from train.model.checkpoint import Checkpoint, HeldOut
from train.model.kernels import numba_loops
from train.model.quiet import Quiet
from train.model.step_output import StepOutput
from train.model.transcoder import Transcoder
from train.parallel.dictionary import ShardedTranscoder
from train.parallel.ranks import Ranks
from train.run.bad_rows import BadRows
from train.run.cadences import Cadences
from train.run.determinism import arithmetic, require_same
from train.run.latent_counters import Counters
from train.run.load_run import build_transcoder, rows_of
from train.run.merging import Merging
from train.run.metrics import LOWER_LR, Window, diverged, logged_steps
from train.run.optimizer import Optimizer
from train.run.process import OwnProcess
from train.run.saver import Saver
from train.run.self_test import prove
from train.run.settings import RunConfig, checkpoint_bytes
from train.run.step_graph import graph_of
from train.run.training_log import TrainingLog
from train.run.usage import SAMPLES, Usage
from train.samples.make_samples import make_samples
from train.samples.parquet import paths


class Trainer:
    """The state of a run between two steps."""

    def __init__(
        self,
        store: Store,
        config: RunConfig,
        path: Path,
        initial: Callable[[Transcoder], object] | None = None,
        resumed: Checkpoint | None = None,
        *,
        fallback: Path | None = None,
        inexact: bool = False,
        ranks: Ranks | None = None,
        process: OwnProcess | None = None,
    ) -> None:
        """Set up a run.

        `initial`: gives the transcoder its first weights. `fallback`: a run's folder for checkpoints that have no room
        here. `inexact`: see `require_same`. `ranks`: the processes that share the run, which have joined. `process`:
        that of several runs, if it has not one of its own.
        """
        store = store.excluding(config.exclusion)
        self._store, self._config, self._path, self._rows = store, config, path, rows_of(config, store)
        self._settings, self._process = config.settings, process or OwnProcess()
        use_threads(self._settings.threads)
        prove(self._settings)
        self._graph = graph_of(self._settings)
        device = torch.device(self._settings.device)
        blocks = config.training_blocks
        self._reader = self._process.reader(store, config)
        self._transcoder = build_transcoder(config, store)
        shards = self._settings.parallel.shards
        self._ranks = ranks or Ranks()
        self._sharded = ShardedTranscoder(self._transcoder, shards, self._ranks) if shards > 1 else None
        """What is trained where the dictionary is cut; the transcoder then has its weights when `_agree` says so."""
        self._joins = self._transcoder.joins and not self._sharded
        """Whether rows, counters and figures are left to kernels that do much at once"""
        self._trained = self._sharded or self._transcoder
        self._optimizer = Optimizer(self._trained, self._settings.optimizer, config.length_at)
        strata = self._reader.slices()
        weights = self._reader.natural_weights().to(device)
        at_0 = strata.get(POSITION_0, slice(0, 0))
        scans = Scans(
            self._transcoder,
            int(self._settings.monitor.every),
            random_at_start=initial is None and resumed is None,
        )
        self._diversity = Diversity(
            self._transcoder, self._settings.diversity, weights, at_0, self._settings.seed, scans
        )
        self._monitor = CorrelationMonitor(
            path if self._ranks.rank == 0 else None,
            self._settings.monitor,
            self._transcoder,
            strata,
            self._settings.steps,
            scans,
        )
        dead_after = self._settings.auxk.dead_after(config.lengths[0] * self._settings.rows.batch_rows)
        self._counters = Counters(self._transcoder.d_sae, dead_after, device)
        apart = self._reader.has_outliers
        self._window = Window(strata, self._transcoder.prefixes, config.d_out, weights, outliers=apart)
        self._merging = Merging(config)
        self._usage = Usage(path, self._settings, self._reader.slices())
        self._parts = (
            self._optimizer,
            self._counters,
            self._window,
            self._diversity,
            self._monitor,
            self._merging,
            self._usage,
        )
        """What has state beside the weights."""
        self._log = TrainingLog(path, self._settings.steps, self._settings.rows.batch_rows, self._process.cpu_seconds)
        self._arithmetic = arithmetic(self._settings.device)
        self._saver = Saver(
            path,
            self._settings.checkpoint,
            self._arithmetic,
            checkpoint_bytes(self._settings, config.d_in, config.d_out),
            logs=self._log.paths,
            fallback=fallback,
            failed=lambda: self._usage.take_back("checkpoint"),
            record=config.model_dump(mode="json"),
            shards=shards,
        )
        self._every = Cadences.of(
            self._settings.log_every,
            self._settings.monitor.every,
            self._settings.evaluation.every,
            self._settings.checkpoint.every,
        )
        self._bad_rows = BadRows(self._reader, self._settings.source, path, device)
        self._calibrated: tuple[int, Tensor] | None = None
        self._first = self._done = 0
        self._held_out_fvu = resumed.state.held_out.fvu if resumed and resumed.state.held_out else None
        """Of the last evaluation."""
        self._warned = False
        if self._sharded and not inexact:
            self._ranks.require_same(json.dumps(self._arithmetic))
        if resumed and not inexact:
            require_same(resumed.state.arithmetic, self._arithmetic, str(resumed.path))
        self._initialise(initial, resumed)
        self._quiet = Quiet.of(  # with the checkpoint's means and scales: the store has others once it was extended
            self._transcoder,
            self._settings.quiet,
            store,
            blocks,
            self._settings.source,
            self._settings.rows.batch_rows,
            self._trained.positive_sum,
        )

    def train(self) -> None:
        """Run to the last step. Raises `Stopped` after a signal, with a checkpoint published.

        Raises `ProjectError` where the run's folder is removed or renamed meanwhile, and at the end of a run that has
        diverged, all of whose files are there then.
        """
        self._folder = self._path.stat()
        self._log.open(self._first, expected := self._logged_steps())
        if expected:
            self._usage.warn_if_missing()
        self._saver.prune()
        with durable.staying(self._path), self._process.stop_signals() as stop:
            try:
                if self._first < self._settings.steps:
                    self._train(stop)
                self._finish(stop)
            except (OSError, ProjectError):
                self._require_folder()  # once that is gone, what failed does not matter
                raise
        self._log.warn_of_lost_rows()
        if self._held_out_fvu is not None and diverged(self._held_out_fvu):
            raise ProjectError(
                f"{self._path} has diverged: its held-out fvu at step {self._settings.steps:,} is "
                f"{self._held_out_fvu:,.1f}, and the mean alone leaves 1; {LOWER_LR}"
            )

    def _logged_steps(self) -> list[int]:
        """List the steps that the logs have rows of already."""
        settings = self._settings
        return logged_steps(self._every.log, self._every.evaluation, settings.steps, self._first)

    def _train(self, stop: list[int]) -> None:
        settings = self._settings
        self._log.start_clock()
        if settings.device == "cpu" and not numba_loops.compiled_before():
            say("compiling the loops of the first step: half a minute, once on this machine")
        bar = Progress("train", settings.steps, "steps", done=self._first, draw=RunPanel(self._log.status).draw)
        with self._saver, self._reader, bar as progress:
            for step in range(self._first, settings.steps):
                self._process.wait_for_turn(step)
                output, lr = self._step(step)
                done = self._done = step + 1
                stopping, last = self._agree(done, stop)
                if last or any(self._due(done, every) for every in self._every):
                    self._bad_rows.refuse()
                    self._require_folder()
                self._report(done)
                held_out = self._evaluate(done) if self._due(done, self._every.evaluation) else None
                note = detail = ""
                if held_out or self._due(done, self._every.log):
                    self._write_row(done, output, lr, held_out)
                    note, detail = self._log.status.note(), self._log.status.detail()
                progress.update(done, note, detail)
                if last or self._due(done, self._every.checkpoint):
                    self._checkpoint(done, held_out, last=last)
                if stopping and done < settings.steps:
                    raise Stopped(f"stopped at step {done}; continue with: python -m train resume {self._path}")

    def _finish(self, stop: list[int]) -> None:
        """Do what follows the last checkpoint; resuming a finished run makes it again where some of it is missing."""
        self._require_folder()
        monitor, samples = self._settings.monitor.every != 0, self._settings.samples.rows > 0
        steps = self._settings.steps
        there = (not monitor or self._monitor.reported_held_out) and (not samples or self._sampled)
        if self._first == steps and there and self._usage.finished(steps):
            say(f"{self._path} is finished: {steps} steps")
            return
        if monitor:
            self._report_held_out()
        if samples:
            self._sample(stop)
        self._usage.finish(steps)

    def _agree(self, done: int, stop: list[int]) -> tuple[bool, bool]:
        """Tell whether a process is to stop after this step, and whether it is the last.

        Where what follows the step reads the transcoder, and the dictionary is cut, all its weights are brought there.
        """
        stopping = self._ranks.any(bool(stop))
        last = stopping or done == self._settings.steps
        reads = self._monitor.is_complete(done) or self._merging.due(done)
        if self._sharded and (last or reads or any(self._due(done, every) for every in self._every)):
            self._sharded.refresh()
        return stopping, last

    def _due(self, done: int, every: int) -> bool:
        return done == self._settings.steps or (bool(every) and done % every == 0)

    def _report(self, done: int) -> None:
        """Finish the monitor's report that is complete after this step, begin one, and merge latents, where due."""
        self._follow(done)
        if self._monitor.due(done):
            self._monitor.begin(done, self._counters.dead())
            self._follow(done)
        if self._merging.due(done):
            self._merge(done)

    def _merge(self, done: int) -> None:
        changed, freed = self._merging.merge(self._transcoder, self._rows, done)
        self._usage.call("merge", effect=freed)
        for part in (self._optimizer, self._counters, self._diversity, self._monitor):
            part.start_anew(changed)
        if self._sharded:
            self._sharded.take()
        self._transcoder.low_weights()  # where a recorded step reads them

    def _follow(self, done: int) -> None:
        if not self._monitor.is_complete(done):
            return
        report = self._monitor.finish()
        self._usage.call("monitor", effect=len(report.pairs))
        moved = self._diversity.follow(report, self._monitor.correlated)
        if self._settings.diversity.controller.on:
            self._usage.call("controller", effect=moved)

    def _report_held_out(self) -> None:
        done, blocks = self._settings.steps, self._store.record.report_blocks
        rows = held_out_active(self._transcoder, self._rows, blocks, self._threshold(done))
        self._monitor.report_held_out(done, rows, self._counters.dead())
        del rows
        self._process.end_of_large_part()

    def _step(self, step: int) -> tuple[StepOutput, float]:
        """Train on one batch; returns what the step computed, and the learning rate."""
        lr, device = self._optimizer.begin(step), torch.device(self._settings.device)
        inputs = self._reader.fetch(step)
        if self._reader.has_outliers:
            inputs.append(sent(torch.from_numpy(self._reader.outliers(step)), device))
        changing = self._settings.activation.expected_l0_at(step), self._diversity.changes
        key = None if self._diversity.asks_host(step) else changing
        output = self._graph.run(step, key, inputs, lambda given: self._compute(given, step))
        self._monitor.add(output, step + 1)
        self._usage.call(*output.terms)
        self._window.note(output)
        return output, lr

    def _compute(self, inputs: Sequence[Tensor], step: int) -> StepOutput:
        """Train on the rows that `inputs` stand for; a step that may be recorded reads its number on the device."""
        rows, outliers = (inputs[:-1], inputs[-1]) if self._reader.has_outliers else (inputs, None)
        dead, settings = self._counters.dead(), self._settings
        logged = any(self._due(step + 1, every) for every in (self._every.log, self._every.evaluation))
        number = self._graph.number
        now: int | Tensor = step if number is None else number

        # Reconstruction of every prefix, the activation's penalty, and aux-k.
        batch, bad = None, None
        if self._joins:
            number = torch.full((), step, device=dead.device) if number is None else number
            now, bad = number, (self._bad_rows.first, number)
            x, y = self._prepared(rows, number)
            output = self._transcoder.step_of(x, y, dead, settings.auxk, step, logged, number)
        else:
            batch = self._reader.rows_of(rows)
            output = self._trained.step(batch.source, batch.target, dead, settings.auxk, step, logged, number)
        # Terms of the latents' values reach the encoder through the same pairs: they share the backward.
        of_values = self._diversity.value_terms(output)
        # Terms of decoder rows, and of rows that training leaves out, have a backward each.
        if self._sharded:
            self._sharded.refresh_decoder(self._diversity.rows_read(step))
        # One that is joined to the loss has none, since its gradient goes with that of the loss.
        apart = self._diversity.direction_terms(dead, step, output.joined) | self._quiet.terms(now, output.joined)
        first, *others = output.losses
        beside = [term for term in of_values.values() if term.requires_grad]
        loss = first + sum(beside) if beside else first
        grad_norm = self._optimizer.update([loss, *others, *(term for term in apart.values() if term.requires_grad)])

        # From here on only counting: none of it waits for the device.
        if batch:
            self._bad_rows.note(output.loss + sum((of_values | apart).values()) + grad_norm, batch, now)
        output = output.with_terms(of_values | apart).detached()
        self._counters.update(output)
        self._window.add(output, grad_norm, outliers, bad)
        return output

    def _prepared(self, inputs: Sequence[Tensor], number: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised source and target rows; bad ones are noted, as by `BadRows.note`."""
        from train.model.kernels.triton_rows import Stored, prepared  # not there without CUDA

        (tables, places), model = self._reader.stored(inputs), self._transcoder
        source, target = (model.source_mean, model.source_scale), (model.target_mean, model.target_scale)
        longest, bad = self._bad_rows.longest, (self._bad_rows.first, number)
        sides = Stored(tables[0], *source, longest[0]), Stored(tables[-1], *target, longest[1])
        return prepared(*sides, places, *bad, model.source_rms_eps)

    def _write_row(self, done: int, output: StepOutput, lr: float, held_out: Evaluation | None) -> None:
        """Write a row to the logs, and what every component has done."""
        row = self._window.row() | {
            "lr": lr,
            "dead_share": int(self._counters.dead().sum()) / self._transcoder.d_sae,
            "running_threshold": float(self._counters.threshold),
            "l0_threshold": self._l0_by_running_threshold(output.pre_acts),
            "epochs": self._reader.epochs(done),
            "weight_scales": self._diversity.scales,
        }
        if held_out:
            row["held_out"] = held_out.model_dump(mode="json")
        self._warn_if_diverged(done, row)
        self._usage.effects(row["terms"], row["steps"])
        search = self._transcoder.guarded.figures() if self._transcoder.guarded else {}
        replayed = {"steps_replayed": float(self._graph.replayed)} if self._graph.replayed else {}
        figures = search | replayed | self._merging.timing()
        self._log.write(done, row | self._merging.row(), self._reader.waited, figures, self._usage.publish)

    def _warn_if_diverged(self, done: int, row: Row) -> None:
        """Warn, once, of the first row of the log whose fvu is far above what the mean alone leaves."""
        figures = {"fvu": row["fvu"], "held-out fvu": row.get("held_out", {}).get("fvu")}
        found = next((one for one in figures.items() if one[1] is not None and diverged(one[1])), None)
        if found and not self._warned:
            self._warned = True
            warn(
                f"step {done:,}: {found[0]} is {found[1]:,.1f}, and the mean alone leaves 1: the training diverges; "
                f"{LOWER_LR}"
            )

    def _evaluate(self, done: int) -> Evaluation:
        found = evaluate(self._transcoder, self._rows, self._threshold(done), self._settings.seed)
        self._held_out_fvu = found.fvu
        self._usage.call("evaluation", effect=found.rows)
        self._process.end_of_large_part()
        return found

    def _threshold(self, done: int) -> Tensor:
        """Return calibrated inference thresholds [F] of the present weights.

        A step that needs them twice calibrates once.
        """
        if self._calibrated is None or self._calibrated[0] != done:
            self._calibrated = done, calibrate(self._transcoder, self._rows)
        return self._calibrated[1]

    def _checkpoint(self, done: int, held_out: Evaluation | None, *, last: bool) -> None:
        self._saver.wait()  # before its loss could be counted beside this call
        if self._due(done, self._every.checkpoint):  # one after a signal is not of the uninterrupted run
            self._usage.call("checkpoint", effect=1)
        settings = self._settings.evaluation
        if held_out or done == self._settings.steps:
            threshold = self._threshold(done)
        else:
            threshold = calibrate(self._transcoder, self._rows, settings.calibration_rows)
        weights = self._transcoder.state_dict() | {"threshold": threshold}
        state = {name: tensor for part in self._parts for name, tensor in part.state().items()}
        figures = HeldOut(fvu=held_out.fvu, l0=held_out.l0) if held_out else None
        (self._saver.save_last if last else self._saver.save)(done, weights, state, figures)

    @property
    def _sampled(self) -> bool:
        return all(path.is_file() for path in paths(self._path, self._settings.steps))

    def _sample(self, stop: list[int]) -> None:
        """Write samples of the last step. A full disk costs the files and one warning, never the run."""
        done, settings = self._settings.steps, self._settings.samples
        try:
            found = make_samples(
                self._transcoder,
                self._rows,
                self._config.training_blocks,
                self._threshold(done),
                settings,
                seed=self._settings.seed,
                step=done,
                stop=stop,
            )
        except Stopped as error:
            raise Stopped(f"{error}; continue with: python -m train resume {self._path}") from error
        self._usage.call(SAMPLES, effect=found.record.latents)
        try:
            found.publish(self._path)
        except DiskFull as error:
            warn(f"{error}; the run is finished, and has no samples")

    def _initialise(self, initial: Callable[[Transcoder], object] | None, resumed: Checkpoint | None) -> None:
        """Take weights from `resumed`, with all other state; else from `initial`, weights only; else random."""
        if resumed:
            self._transcoder.load_checkpoint(resumed)
            path, tensors = resumed.path / checkpoint.OPTIMIZER, checkpoint.load_optimizer(resumed)
            try:
                for part in self._parts:
                    part.load(tensors)
            except (ValueError, KeyError) as error:
                raise CorruptData(f"{path}: {error}") from error
            self._first = self._done = resumed.step
        elif initial:
            initial(self._transcoder)
        else:
            self._transcoder.initialise(self._settings.seed)
        if self._sharded:
            self._sharded.take()

    def _l0_by_running_threshold(self, pre_acts: Tensor | None) -> float:
        """Return active latents per row of one batch by the running threshold, without position 0."""
        assert pre_acts is not None, "a step that is logged has all pre-activations"
        counts, strata = (pre_acts > self._counters.threshold).sum(1), self._reader.slices()
        rows = [counts[s] for name, s in strata.items() if name != POSITION_0 or len(strata) == 1]
        return float(torch.cat(rows).double().mean())

    def _require_folder(self) -> None:
        """Raise `ProjectError` when the run is no longer where it was: what is written there would belong to no run."""
        try:
            there = os.path.samestat(self._path.stat(), self._folder) and (self._path / CONFIG).is_file()
        except FileNotFoundError:
            there = False
        if not there:
            raise ProjectError(
                f"{self._path} was removed or renamed while it was trained; nothing is written there after step "
                f"{self._done:,}; if it was renamed, continue with: python -m train resume NEW_NAME"
            )


def use_threads(count: int) -> None:
    """Use `count` CPU threads for torch, and as many for the compiled loops."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # its first call also gives OpenMP one per core
    torch.set_num_threads(count)
