"""A dictionary in virtual shards: the step of one, by several processes with the same bits, killed and carried on."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shared.check_settings import Unfit
from tests.runs import SMALL, assert_same_run, rows
from tests.stores import SyntheticStore
from train.model import checkpoint
from train.model.activations import BatchTopK
from train.model.losses import AuxKConfig
from train.model.shards import deal, join
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.parallel.dictionary import ShardedTranscoder
from train.parallel.ranks import Ranks
from train.parallel.required import mine, required
from train.parallel.select import candidates, histogram
from train.run.optimizer import Optimizer, OptimizerConfig

ROOT = Path(__file__).parents[1]
B, D, O, F, V = 24, 10, 7, 32, 4
SHARDS = ["--set", "parallel.shards=8"]
ALL_TERMS = [
    part
    for one in (
        "auxk.dead_after_tokens=400",
        "diversity.orthogonality.weight=1",
        "diversity.position.weight=1",
        "rows.position_0=train",
        "rows.max_position_0_batch_share=0.1",
        "monitor.every=8",
        "monitor.least_together=2",
        "checkpoint.every=10",
        "evaluation.every=20",
        "log_every=5",
    )
    for part in ("--set", one)
]
LINE = [*SMALL, *SHARDS, *ALL_TERMS, "--steps", 200, "--set", "samples.rows=512"]


def launch(processes: int, *line: object) -> "subprocess.Popen[str]":
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    whole = [str(part) for part in (*runner, "-m", "train", *line)]
    return subprocess.Popen(whole, cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True)


def process_of(runner: "subprocess.Popen[str]", rank: int) -> int:
    """The process of a rank that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == runner.pid and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no process of rank {rank}")


def a_model(kernels: str = "compiled") -> Transcoder:
    config = TranscoderConfig(d_sae=F, prefixes=(4, 8, 32), skip=True, whole_weight=4).resolve(D, BatchTopK(k=5))
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(2, D, generator=generator)
    model = Transcoder(D, O, config, BatchTopK(k=5), Normalisation(mean[0], 1.5, mean[1, :O], 0.7))
    model.initialise(0)
    with torch.no_grad():
        model.b_enc.copy_(0.1 * torch.randn(F, generator=generator))
        model.b_dec.copy_(0.1 * torch.randn(O, generator=generator))
    model.kernels = kernels  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("kernels", ["compiled", "triton"])
def test_the_step_of_shards_is_that_of_the_whole(kernels: str) -> None:
    """Loss, values, every gradient and the weights after Adam, against whole dense matrices; with dead latents."""
    generator = torch.Generator().manual_seed(4)
    source, target = (torch.randn(B, width, generator=generator) for width in (D, O))
    dead, auxk = torch.arange(F) % 3 == 0, AuxKConfig(k=4, row_stride=2, dead_per_active=3)
    models = [a_model("dense"), a_model(kernels)]
    sharded = ShardedTranscoder(models[1], V, Ranks())
    sharded.take()
    outputs = [one.step(source, target, dead, auxk, 1, whole=True) for one in (models[0], sharded)]
    x = models[0].normalised_source(source)
    quiet = [one.positive_sum(x[:3], torch.full((3, 1), 0.5)) for one in (models[0], sharded)]
    trained = (models[0], sharded)
    config = OptimizerConfig(lr=0.1, decoder_rate=4).resolve(10, D, unit_decoder=True)
    steps = [Optimizer(one, config, lambda _: 10) for one in trained]
    norms = []
    for optimizer, output, silence in zip(steps, outputs, quiet, strict=True):
        of_values = (output.values * output.active.rows).sum()  # a term of values, as the diversity loss has them
        first, *others = output.losses
        norms.append(optimizer.step([first + of_values, *others, silence], 0)[1])
    expected, found = outputs
    assert expected.active.latents.tolist() == found.active.latents.tolist()
    assert sorted(found.terms) == ["auxk", "reconstruction"] and float(found.terms["auxk"]) > 0
    for name in ("loss", "errors", "target", "values", "threshold", "pre_acts"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quiet[1], quiet[0])
    torch.testing.assert_close(norms[1], norms[0])
    sharded.refresh()
    for name, weights in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], weights, rtol=1e-4, atol=1e-5, msg=name)
    moments = [optimizer.state() for optimizer in steps]
    assert moments[0].keys() == moments[1].keys()
    for name, expected_moments in moments[0].items():
        torch.testing.assert_close(moments[1][name], expected_moments, rtol=1e-3, atol=1e-6, msg=name)
    again = Optimizer(sharded, config, lambda _: 10)
    again.load(moments[1])
    assert all(torch.equal(again.state()[name], moment) for name, moment in moments[1].items())


def test_decoder_rows_are_brought_where_terms_read_them() -> None:
    model = a_model()
    sharded, kept = ShardedTranscoder(model, V, Ranks()), torch.tensor([1, 4, 5, 31])
    sharded.take()
    before = model.W_dec.detach().clone()
    with torch.no_grad():
        for one in sharded.parts:
            one.W_dec.add_(one.latents.unsqueeze(1))
    sharded.refresh_decoder(kept)
    expected = before.clone()
    expected[kept] += kept.unsqueeze(1)
    assert torch.equal(model.W_dec, expected)
    model.W_dec.grad = torch.arange(F * O).view(F, O).float()
    for one in sharded.parts:
        one.W_dec.grad = torch.ones_like(one.W_dec)
    sharded.take_gradients()
    for one in sharded.parts:
        assert one.W_dec.grad is not None
        assert torch.equal(one.W_dec.grad, 1 + torch.arange(F * O).view(F, O).float()[one.latents])


def test_selection_over_shards_is_that_of_sorting() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.cat([torch.rand(200, generator=generator) * 10.0**power for power in range(-30, 30, 7)])
    values = torch.cat([values, values[:50]])  # equal ones
    falling = values.sort(descending=True).values
    counts = torch.stack([histogram(part) for part in values.chunk(V)])
    for n in (1, 2, 77, 400, len(values)):
        edge, most = candidates(counts, n)
        sent = [int((part >= edge).sum()) for part in values.chunk(V)]
        assert max(sent) == most and n <= sum(sent) and float(edge) > 0.96 * float(falling[n - 1])
    edge, most = candidates(0 * counts, 0)
    assert most == 0 and not (values >= edge).any()
    sharded = ShardedTranscoder(a_model(), V, Ranks())
    tables = torch.randn(3, B, F, generator=generator)
    tables[0, 3], tables[2] = tables[0, 5], -tables[2].abs()  # equal ones, and none that is positive
    for table in tables:
        for n in (1, 50, 100):
            parts = [table[:, v::V].contiguous() for v in range(V)]
            selected, active, smallest = sharded._batch_topk(parts, n)
            expected = table.flatten().relu().sort(descending=True).values[n - 1]
            assert float(smallest) == float(expected)
            wanted = ((table >= expected) & (table > 0)).nonzero()
            assert torch.equal(torch.stack([active.rows, active.latents], 1), wanted)
            assert torch.equal(active.values, table[active.rows, active.latents])
            for one, own, places in zip(sharded.parts, selected.active, selected.places, strict=True):
                assert torch.equal(own.latents * V + one.number, active.latents[places])
                assert torch.equal(own.rows, active.rows[places]) and torch.equal(own.values, active.values[places])


def test_the_largest_of_rows_over_shards_are_those_of_sorting() -> None:
    table = torch.randn(V, 6, 5, generator=torch.Generator().manual_seed(5))
    table[1, 2], table[0, 3] = -torch.inf, table[1, 3]
    table[:, 4] = -torch.inf
    found = ShardedTranscoder(a_model(), V, Ranks())._largest_of_rows(table, 4)
    for row in range(6):
        order = sorted((-float(table[v, row, i]), v, i) for v in range(V) for i in range(5))[:4]
        expected = {(v, i) for value, v, i in order if value < float("inf")}
        assert {(v, i) for v in range(V) for i in range(5) if found[v, row, i]} == expected


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_sums_over_processes_are_made_by_pairs(rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes, each a thread here, that hold 8 shards; also if some have no row."""
    shards = torch.randn(8, rows, 3, generator=torch.Generator().manual_seed(6)) * 10.0 ** torch.arange(8).view(8, 1, 1)
    lines: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
        divmod(i, size): queue.Queue() for i in range(size * size)
    }

    def swap(self: Ranks, peer: int, sent: list[torch.Tensor], received: list[torch.Tensor]) -> None:
        for one in sent:
            lines[self.rank, peer].put(one.clone())
        for one in received:
            one.copy_(lines[peer, self.rank].get(timeout=10))

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, each = Ranks(), 8 // size
        ranks.rank, ranks.size = rank, size
        table = by_pairs(list(shards[rank * each : (rank + 1) * each])).clone()
        own = ranks.add(table)
        more = torch.full((rows,), -1)
        more[own] = torch.arange(rows)[own]
        ranks.spread(table, more)
        assert torch.equal(ranks.gathered(shards[rank * each : (rank + 1) * each]), shards)
        return table, more

    monkeypatch.setattr(Ranks, "_swap", swap)
    expected = by_pairs(list(shards))
    with ThreadPoolExecutor(size) as threads:
        for table, more in threads.map(work, range(size)):
            assert torch.equal(table, expected) and more.tolist() == list(range(rows))


def by_pairs(tables: list[torch.Tensor]) -> torch.Tensor:
    """The sum of neighbours, of neighbouring sums, and so on."""
    while len(tables) > 1:
        tables = [a + b for a, b in zip(tables[::2], tables[1::2], strict=True)]
    return tables[0]


def test_shards_are_cut_and_joined() -> None:
    tensors = {"W_enc": torch.randn(3, 8), "W_dec.exp_avg": torch.randn(8, 2), "b_enc.step": torch.tensor(3.0)}
    tensors["threshold"], tensors["b_dec"] = torch.randn(8), torch.randn(2)
    rest, parts = deal(tensors, 4)
    assert sorted(rest) == ["b_dec", "b_enc.step"]
    assert torch.equal(parts[1]["W_enc"], tensors["W_enc"][:, [1, 5]])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in (rest | join(parts)).items())
    with pytest.raises(ValueError, match="threshold"):
        join([parts[0], {name: part for name, part in parts[1].items() if name != "threshold"}])


ASKED = {"threads": 0, "kernels": "auto", "product_dtype": "auto"}


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    assert required(1, ASKED, "topk", 30, "cpu") == {}
    assert required(8, ASKED, "batchtopk", 64, "cpu")["threads"] == 1
    for asked, kind, d_sae, words in (
        ({"threads": 4}, "batchtopk", 64, "needs threads = 1, got 4"),
        ({"kernels": "dense"}, "batchtopk", 64, "needs kernels = compiled, got dense"),
        ({"product_dtype": "bfloat16"}, "batchtopk", 64, "product_dtype"),
        ({}, "topk", 64, "batchtopk, got topk"),
        ({}, "batchtopk", 60, "d_sae = 60 is not a multiple"),
    ):
        with pytest.raises(Unfit, match=re.escape(words)):
            required(8, ASKED | asked, kind, d_sae, "cpu")
    for shards, words in ((1, "parallel.shards = 1 leaves them nothing"), (8, "3 processes cannot share")):
        with pytest.raises(Unfit, match=words):
            mine(shards, 0, 3)


def test_torchrun_without_shards_or_with_another_command_is_one_clear_error(
    command, pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused = command("run", "--store", pristine.path, *SMALL, "--steps", 2, "--runs", tmp_path / "runs")
    assert refused.code == 2 and refused.err.count("error:") == 1 and "--set parallel.shards=8" in refused.err
    assert not (tmp_path / "runs").exists()
    other = command("evaluate", tmp_path / "runs")
    assert other.code == 2 and "evaluate for one process" in other.err
    monkeypatch.setenv("RANK", "1")
    silent = command("evaluate", tmp_path / "runs")
    assert silent.code == 2 and silent.err == ""


def test_commands_read_a_run_in_shards_as_any_other(command, pristine: SyntheticStore, tmp_path: Path) -> None:
    """The same figures as without shards, but for rounding; every reader takes it; one file when it is exported."""
    runs = []
    for name, more in (("whole", ["--set", "product_dtype=float32"]), ("cut", SHARDS)):
        given = [*SMALL, *ALL_TERMS, "--steps", 40, *more, "--runs", tmp_path / "runs", "--name", name]
        done = command("run", "--store", pristine.path, *given)
        assert done.code == 0, done.err
        runs.append(done.path)
    whole, cut = runs
    for expected, found in zip(rows(whole), rows(cut), strict=True):
        assert sorted(found["terms"]) == sorted(expected["terms"])
        for term, value in expected["terms"].items():
            rel = 1e-2 if term == "auxk" else 1e-3  # which rounding can let a latent die a step later
            assert found["terms"][term] == pytest.approx(value, rel=rel, abs=1e-6), term
        assert found["l0_threshold"] == pytest.approx(expected["l0_threshold"], rel=1e-2)
    files = {path.name for path in checkpoint.find(cut).path.iterdir()}
    assert files == {"weights.safetensors", "optimizer.safetensors", "state.json"} | {
        f"shard-{i}-of-8.safetensors" for i in range(8)
    }
    figures = [json.loads(command("evaluate", run, "--json").out)["fvu"] for run in runs]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
    exported = command("export", cut, "--format", "saelens", "--out", tmp_path / "exported")
    assert exported.code == 0, exported.err
    weights = [Transcoder.load(run).state_dict() for run in runs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    from_cut = command(
        "run", "--store", pristine.path, *SMALL, "--steps", 2, "--init-from", cut, "--runs", tmp_path / "runs"
    )
    assert from_cut.code == 0, from_cut.err
    for line in (["samples", cut], ["report", cut], ["compare", whole, cut], ["checkpoints", cut]):
        done = command(*line)
        assert done.code == 0, (line, done.err)
    shard = checkpoint.find(cut).path / "shard-3-of-8.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "shard-3-of-8.safetensors: " in command("evaluate", cut, "--step", 40).err


@pytest.mark.fault(62)
@pytest.mark.slow(30)
def test_processes_train_the_run_of_one_and_others_carry_it_on(
    command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    """Two processes, one of them killed; four carry on; one is stopped by a signal, and finishes."""
    alone = command("run", "--store", pristine.path, *LINE, "--runs", tmp_path / "alone", "--name", "run").path
    run = tmp_path / "runs" / "run"
    pair = launch(2, "run", "--store", pristine.path, *LINE, "--runs", run.parent, "--name", run.name)
    began = time.monotonic()
    while not list(run.glob("checkpoints/step-*")):
        assert pair.poll() is None, pair.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    os.kill(process_of(pair, 1), signal.SIGKILL)
    _, err = pair.communicate(timeout=60)
    assert pair.returncode != 0 and "another process of this training stopped" in err
    reached = checkpoint.find(run).step
    assert 10 <= reached < 200

    four = launch(4, "resume", run)
    while len(list(run.glob("checkpoints/step-*"))) < 2 or checkpoint.find(run).step <= reached:
        assert four.poll() is None, four.communicate()
        time.sleep(0.01)
    os.kill(process_of(four, 3), signal.SIGTERM)
    _, err = four.communicate(timeout=60)
    assert "stopped at step" in err and f"resume {run}" in err, err
    assert checkpoint.find(run).step > reached

    finished = command("resume", run)
    assert finished.code == 0, finished.err
    assert_same_run(alone, run)
