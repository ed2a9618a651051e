"""Mistakes in options, settings, stores and sweeps are answered before torch is imported, which takes seconds."""

import json
import os
import subprocess
import sys

import pytest

from tests.llms import ROOT
from tests.stores import SyntheticStore

WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None
import train.cli
from shared.command_line import run
found = []
for line in json.load(sys.stdin):
    sys.argv, said = ["train", *line], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            run(train.cli.main)
        except SystemExit as stop:
            found.append([stop.code, said.getvalue()])
        except ImportError as error:
            found.append([None, str(error)])
json.dump(found, sys.stdout)
"""
"""Runs commands where importing torch is an error; they come in, and exit codes and errors go out, as JSON."""
REPORTS = (
    "diversity.co_activation takes its pairs after the monitor's reports, and none would come before the last step"
)
EARLY = {
    "alias": (["k=1"], "--set k=1: unknown option 'k'; did you mean 'activation.k'?"),
    "k": (
        ["activation.k=5000"],
        "--set transcoder.d_sae=256 --set activation.k=5000: activation.k = 5000 is more than d_sae = 256; lower it or "
        "raise transcoder.d_sae",
    ),
    "d_sae": (
        ["transcoder.d_sae=8X"],
        "--set transcoder.d_sae=8X: transcoder.d_sae must be a positive number or a multiple such as 8x, got 8X",
    ),
    "prefixes": (
        ["transcoder.prefixes=[64, 128]"],
        "--set transcoder.d_sae=256 --set transcoder.prefixes=[64, 128]: transcoder.prefixes must end at d_sae = 256, "
        "got [64, 128]",
    ),
    "no prefixes": (
        ["transcoder.prefixes=[]"],
        "--set transcoder.prefixes=[]: transcoder.prefixes is an empty list; for one group use "
        "--set transcoder.prefixes=[256]",
    ),
    "k has no warm-up": (
        ["activation.k_warmup_share=0"],
        "--set activation.k_warmup_share=0: activation.k_start = 3x, and no warm-up leads from it to k = 32: every "
        "step would have k; set activation.k_warmup_share above 0, or leave out k_start",
    ),
    "k has a warm-up of no step": (
        ["activation.k_warmup_share=0.001", "steps=100"],
        "--set activation.k_warmup_share=0.001 --set steps=100: activation.k_start = 3x, and no warm-up leads from it "
        "to k = 32 (activation.k_warmup_share = 0.001 of 100 steps is less than 1): every step would have k; raise "
        "it, or leave out k_start",
    ),
    "warm-up of k": (
        ["activation.k_warmup_steps=40", "steps=40"],
        "--set activation.k_warmup_steps=40 --set steps=40: activation.k_warmup_steps = 40, and the run has 40 steps, "
        "so it would end before the warm-up or with it; lower it, or use activation.k_warmup_share",
    ),
    "warm-up of the optimizer": (
        ["optimizer.warmup_share=1"],
        "--set optimizer.warmup_share=1: optimizer.warmup_share = 1, and the run has 5,000 steps, so it would end "
        "before the warm-up or with it; lower it",
    ),
    "warm-up of a penalty": (
        ["activation.kind=jumprelu", "activation.penalty_warmup_steps=5000"],
        "--set activation.penalty_warmup_steps=5000: activation.penalty_warmup_steps = 5,000, and the run has 5,000 "
        "steps, so it would end before the warm-up or with it; lower it, or use activation.penalty_warmup_share",
    ),
    "batch": (
        ["rows.batch_rows=2000"],
        "--set rows.batch_rows=2000: rows.batch_rows = 2,000 is more than the store's 1,536 training rows; lower it",
    ),
    "blocks": (
        ["rows.blocks=4"],
        "--set rows.blocks=4: rows.blocks = 4, and the store has 3 blocks to train on; lower it",
    ),
    "position 0": (
        ["diversity.position.weight=1", "rows.position_0=train"],
        "--set rows.batch_rows=48 --set diversity.position.weight=1 --set rows.position_0=train: diversity.position "
        "needs rows of position 0, and a batch has none: the store keeps none, training leaves them out "
        "(rows.position_0 = train takes them in), or rows.max_position_0_batch_share = 0.003906 of 48 rows is less "
        "than one",
    ),
    "old name": (
        ["diversity.position.weight=1", "rows.position_0=train", "rows.max_bos_batch_share=0.01"],
        "--set rows.batch_rows=48 --set diversity.position.weight=1 --set rows.position_0=train: diversity.position "
        "needs rows of position 0, and a batch has none: the store keeps none, training leaves them out "
        "(rows.position_0 = train takes them in), or rows.max_position_0_batch_share = 0.01 of 48 rows is less than "
        "one",
    ),
    "skip": (
        ["source=target"],
        "--set source=target: transcoder.skip is on and source = target: a linear map from the targets to themselves "
        "copies them, and nothing is left for the latents; use --set transcoder.skip=false",
    ),
    "goal": (
        ["diversity.controller.max_pairs_above_0_8=3", "diversity.co_activation.weight=0"],
        "--set diversity.controller.max_pairs_above_0_8=3 --set diversity.co_activation.weight=0: "
        "diversity.controller.max_pairs_above_0_8 has no weight to move: set diversity.co_activation.weight above 0",
    ),
    "a merge after the last step": (
        ["diversity.merge.at=[0.99]", "steps=30"],
        "--set diversity.merge.at=[0.99] --set steps=30: diversity.merge.at = [0.99] merges after step 30 of 30; "
        "each merge needs a step of its own, before the last one; raise steps, choose other shares, or use --set "
        "diversity.merge.at=[]",
    ),
    "two merges after one step": (
        ["diversity.merge.at=[0.52, 0.5]", "steps=20"],
        "--set diversity.merge.at=[0.52, 0.5] --set steps=20: diversity.merge.at = [0.52, 0.5] merges after "
        "steps 10 and 10 of 20; each merge needs a step of its own, before the last one; raise steps, choose other "
        "shares, or use --set diversity.merge.at=[]",
    ),
    "no report": (
        ["monitor.every=100", "steps=100", "monitor.delay=0"],
        f"--set monitor.every=100 --set steps=100 --set monitor.delay=0: {REPORTS}: monitor.every = 100, steps = 100; "
        "set monitor.every above 0 and below steps, or diversity.co_activation.weight = 0",
    ),
    "co-activation without reports": (
        ["diversity.co_activation.weight=2", "monitor.every=0"],
        f"--set diversity.co_activation.weight=2 --set monitor.every=0: {REPORTS}: monitor.every = 0, steps = 5000; "
        "set monitor.every above 0 and below steps, or diversity.co_activation.weight = 0",
    ),
    "delay": (
        ["monitor.every=100", "monitor.delay=100"],
        "--set monitor.every=100 --set monitor.delay=100: monitor.delay = 100 is not below monitor.every = 100: a "
        "report must be complete before the next begins; use --set monitor.delay=auto",
    ),
    "delay on a device": (
        ["device=cpu", "monitor.delay=100"],
        "--set monitor.delay=100: monitor.delay = 100 is not below monitor.every = 100: a report must be complete "
        "before the next begins; use --set monitor.delay=auto",
    ),
    "together": (
        ["monitor.least_together=9999"],
        "--set monitor.least_together=9999: monitor.least_together = 9999 is more than the 8,192 rows of a sample "
        "(monitor.rows), so no pair could be listed; lower it",
    ),
    "kept by step": (
        ["checkpoint.every=300", "checkpoint.keep_every=1700"],
        "--set checkpoint.every=300 --set checkpoint.keep_every=1700: checkpoint.keep_every = 1700 would keep none but "
        "the last: checkpoint.every = 300, steps = 5000; make the cadences meet earlier",
    ),
    "kept by fvu": (
        ["checkpoint.every=300", "checkpoint.keep_best=1", "evaluation.every=1700"],
        "--set checkpoint.every=300 --set checkpoint.keep_best=1 --set evaluation.every=1700: checkpoint.keep_best = 1 "
        "would keep none but the last: checkpoint.every = 300, evaluation.every = 1700, steps = 5000; make the "
        "cadences meet earlier",
    ),
    "shards": (["parallel.shards=3"], "--set parallel.shards=3: not one of 1, 2, 4, 8, 16, 32, 64"),
    "shards of another kind": (
        ["parallel.shards=8", "activation.kind=topk"],
        "--set parallel.shards=8 --set activation.kind=topk: parallel.shards = 8 is for activation.kind = batchtopk, "
        "got topk; use --set parallel.shards=1",
    ),
    "shards of other kernels": (
        ["parallel.shards=8", "kernels=plain"],
        "--set parallel.shards=8 --set kernels=plain: on the CPU: parallel.shards = 8 needs kernels = compiled, got "
        "plain; leave it out, or use --set parallel.shards=1; on CUDA: parallel.shards = 8 needs kernels = triton, got "
        "plain; leave it out, or use --set parallel.shards=1",
    ),
    "decoder norm": (
        ["transcoder.decoder_norm=free", "activation.kind=relu"],
        "--set transcoder.decoder_norm=free --set activation.kind=relu: transcoder.decoder_norm = free and "
        "activation.kind = relu: its penalty is on latent values, which would shrink while decoder rows grow; use "
        "--set transcoder.decoder_norm=unit",
    ),
    "bytes": (
        ["monitor.every=0", "diversity.co_activation.weight=0", "checkpoint.max_bytes=1000000"],
        "--set transcoder.d_sae=256 --set checkpoint.max_bytes=1000000: checkpoint.max_bytes = 1,000,000 is less than "
        "one checkpoint, about 1,190,400 bytes; raise it, or set it to 0 for no bound",
    ),
    "bytes on any device": (
        ["device=auto", "checkpoint.max_bytes=1000000"],
        "--set transcoder.d_sae=256 --set checkpoint.max_bytes=1000000: checkpoint.max_bytes = 1,000,000 is less than "
        "one checkpoint, about 17,326,976 bytes; raise it, or set it to 0 for no bound",
    ),
    "graph on the CPU": (
        ["device=cpu", "step_graph=on"],
        "--set step_graph=on: step_graph = on, and the device is cpu; use --set step_graph=auto",
    ),
    "graph of other kernels": (
        ["device=cuda", "step_graph=on", "kernels=plain"],
        "--set step_graph=on: step_graph = on, and kernels = plain: those of triton alone keep on the device all that "
        "changes; use --set step_graph=auto",
    ),
    "graph of a penalty": (
        ["step_graph=on", "activation.kind=relu"],
        "--set step_graph=on: on the CPU: step_graph = on, and the device is cpu; use --set step_graph=auto; on CUDA: "
        "step_graph = on, and activation.kind = relu: how many latents are active is asked at every step; use --set "
        "step_graph=auto",
    ),
    "resident": (
        ["device=cpu", "resident_rows=on"],
        "--set device=cpu --set resident_rows=on: resident_rows = on is for CUDA, and the device is cpu; use --set "
        "resident_rows=auto",
    ),
    "blas": (
        ["device=cuda", "blas=numpy"],
        "--set device=cuda --set blas=numpy: blas = numpy is for the CPU, and the device is cuda; use --set blas=torch",
    ),
    "compiled": (
        ["device=cuda:1", "kernels=compiled"],
        "--set device=cuda:1 --set kernels=compiled: kernels = compiled is for the CPU, and the device is cuda:1; use "
        "--set kernels=auto",
    ),
    "tf32": (
        ["device=cpu", "product_dtype=tf32"],
        "--set device=cpu --set product_dtype=tf32: product_dtype = tf32 is for CUDA, and the device is cpu; use "
        "--set product_dtype=float32",
    ),
    "guarded": (
        ["product_dtype=guarded-bfloat16", "kernels=plain"],
        "--set product_dtype=guarded-bfloat16 --set kernels=plain: product_dtype = guarded-bfloat16 is for "
        "activation.kind = batchtopk on kernels = compiled, got batchtopk on plain; use --set product_dtype=float32",
    ),
    "device": (["device=tpu"], "--set device=tpu: device must be auto, cpu, cuda, or cuda:NUMBER, got tpu"),
}


NAMES = {
    "a/b": "--name 'a/b': expected the name of one folder in --runs, without / and control characters; say with --runs "
    "where that folder lies",
    "there": "runs/there exists; continue it with: python -m train resume runs/there, or choose another --name",
    "file": "runs/file is a file, and a run is a folder; choose another --name",
}
LIKE = {
    "runs/lost": "--like runs/lost: no store at /nowhere: no such folder; if it was moved, say where it "
    "is: --store STORE",
    "runs/moved": "--like runs/moved: no store at /moved: no such folder; if it was moved, say where it "
    "is: --store STORE",
    "runs/none": "runs/none is not a run: there is no such folder; the runs in runs: lost, moved",
    "lost": "lost is not a run: there is no such folder; did you mean runs/lost?",
}
SWEEPS = {
    "a name": ("[grid]\nactivation.K = [1]\n", "unknown option 'activation.K'; did you mean 'activation.k'?"),
    "a list": ("[grid]\nseed = 3\n", "grid seed is 3: expected a list of values, such as [0, 1, 2]"),
    "a value twice": ("[grid]\nseed = [0, 1, 0]\n", "grid seed has 0 twice; leave one of them out"),
    "two names": (
        "[[runs]]\nseed = 1\n[[runs]]\nseed = 1\n",
        "two runs are called seed1; write them as [[runs]], each with another name = ...",
    ),
    "a group": (
        "[girds]\nseed = [0]\n",
        "unknown option 'girds.seed'; there are preset, config, stores, set, grid, runs",
    ),
    "a value": ("[set]\nsteps = 0\n[grid]\nseed = [0, 1]\n", "steps = 0: must be at least 1"),
    "a preset": ("preset = 'tinyy'\n", "no preset 'tinyy'; presets: base, gemma-2-2b, tiny; did you mean 'tiny'?"),
    "a preset and a file": (
        "preset = 'tiny'\nconfig = 'a.toml'\n",
        "preset and config both say which settings to start from; leave one of them out",
    ),
    "the store": (
        "[grid]\nrows.batch_rows = [48, 2000]\n",
        "rows.batch_rows = 2,000 is more than the store's 1,536 training rows; lower it",
    ),
    "together": (
        "[set]\nrows.batch_rows = 48\n[grid]\nactivation.k = [32, 5000]\n",
        "activation.k = 5000 is more than d_sae = 128; lower it or raise transcoder.d_sae",
    ),
}
"""Sweeps' files, and the end of what is said of each."""


@pytest.fixture(scope="module")
def answers(pristine: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    """The exit codes and errors of all mistakes above, by one process: its imports take a second."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = {"settings": {}, "asked": {}, "store": "/nowhere"}
    for name in ("lost", "moved"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.json").write_text(json.dumps(config))
    (folder / "runs/moved/store_place.json").write_text('{"store": "/moved"}')
    (folder / "runs/there/checkpoints").mkdir(parents=True)
    (folder / "runs/file").touch()
    given = ["run", "--store", str(pristine.path)]
    sized = [*given, "--set=transcoder.d_sae=256", "--set=rows.batch_rows=48"]
    lines = [
        *([*sized, *(f"--set={one}" for one in settings)] for settings, _ in EARLY.values()),
        *([*given, "--name", name] for name in NAMES),
        *(["run", "--like", run, "--steps", "9"] for run in LIKE),
        *map(list, OPTIONS),
        *(["sweep", f"{number}.toml", "--store", str(pristine.path)] for number in range(len(SWEEPS))),
        sized,
        ["sweep", "good.toml", "--store", str(pristine.path)],
    ]
    for number, (text, _) in enumerate(SWEEPS.values()):
        (folder / f"{number}.toml").write_text(text)
    (folder / "good.toml").write_text("[set]\nrows.batch_rows = 48\n[grid]\nseed = [0, 1]\n")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[object]] = json.loads(done.stdout)
    return found


OPTIONS = {
    ("run", "--lr", "1e-3"): "--lr: no such option; it is a setting: --set optimizer.lr=VALUE",
    ("run", "--d-sae=64"): "--d-sae: no such option; it is a setting: --set transcoder.d_sae=VALUE",
    ("run", "--tokens", "5M"): "--tokens: no such option; it is decided when the store is made: python -m harvest run",
    ("run", "--init_from", "x"): "No such option '--init_from'. Did you mean '--init-from'? (see: train run --help)",
    ("resume", "x", "--set", "steps=9"): "--set: no such option; a run keeps its settings; start another with: python "
    "-m train run --like RUN --set NAME=VALUE",
    ("resume", "x", "--lr", "1e-3"): "--lr: no such option; a run keeps its settings; start another with: python "
    "-m train run --like RUN --set NAME=VALUE",
    ("run", "--set", "device=2024-01-01"): "--set device=2024-01-01: not text",
    ("run", "steps=9"): "no preset 'steps=9'; presets: base, gemma-2-2b, tiny; a setting is given with --set steps=9",
    ("run", "tiny", "--config", "a.toml"): "the preset 'tiny' and --config both say which settings to start from; give "
    "one of them",
    ("settings", "tiny", "--like", "runs/lost"): "the preset 'tiny' and --like both say which settings to start from; "
    "give one of them",
    ("run", "--config", "runs/lost"): "--config runs/lost: it is a folder, and settings are read from a file; for the "
    "settings of a run: --like runs/lost",
    **{
        command: "runs/none is not a run: there is no such folder; the runs in runs: lost, moved"
        for command in (
            ("resume", "runs/none"),
            ("checkpoints", "runs/none"),
            ("evaluate", "runs/none"),
            ("samples", "runs/none"),
            ("report", "runs/none"),
            ("probe", "runs/none"),
            ("explain", "runs/none", "--model", "m"),
            ("compare", "runs/lost", "runs/none"),
            ("export", "runs/none", "--format", "saelens"),
        )
    },
    ("run", "--config", "runs"): "--config runs: it is a folder, and settings are read from a file; name a file in it",
}
MISTAKES = [said for _, said in EARLY.values()] + [*NAMES.values(), *LIKE.values(), *OPTIONS.values()]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[*EARLY, *NAMES, *LIKE, *map(" ".join, OPTIONS)])
def test_a_mistake_is_answered_without_torch(answers: list[list[object]], number: int) -> None:
    assert answers[number] == [2, f"error: {MISTAKES[number]}\n"]


def test_torch_is_imported_where_there_is_no_mistake(answers: list[list[object]]) -> None:
    assert answers[-2:] == [[None, "import of torch halted; None in sys.modules"]] * 2


@pytest.mark.parametrize("number", range(len(SWEEPS)), ids=list(SWEEPS))
def test_a_mistake_of_a_sweep_is_answered_without_torch(answers: list[list[object]], number: int) -> None:
    code, said = answers[len(MISTAKES) + number]
    assert code == 2 and f"error: {number}.toml" in str(said), said
    assert str(said).endswith(f": {list(SWEEPS.values())[number][1]}\n"), said
