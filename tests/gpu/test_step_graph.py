"""A step as one CUDA graph, on a fake device whose replays follow nothing but the device's memory."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ProjectError
from tests.gpu.device_log import DeviceFault
from tests.gpu.fake_device import fake_cuda
from tests.gpu.fake_graph import FakeGraph
from tests.runs import Outcome, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from train.redundancy import merge_latents
from train.redundancy.groups import Judged
from train.redundancy.single_latent import Cost, Single
from train.run.step_graph import StepGraph
from train.run.trainer import Trainer

FEW = {
    "kernels": "triton", "steps": 7, "threads": 1, "rows.batch_rows": 4, "transcoder.d_sae": 16, "activation.k": 2,
    "activation.k_start": 3, "activation.k_warmup_steps": 2, "auxk.k": 2, "auxk.dead_after_tokens": 5,
    "log_every": 3, "monitor.every": 4, "monitor.delay": 1, "monitor.rows": 4, "monitor.least_together": 2,
    "evaluation.every": 7, "checkpoint.every": 4, "samples.rows": 0, "diversity.margin": 0.05,
    "diversity.cross_margin": 0.05, "diversity.co_activation.margin": 0.01, "diversity.position.weight": 0,
}  # fmt: skip
"""Terms of all kinds, k on its way, and latents that die and come back, in few small steps: they are interpreted."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    sizes = {"context_size": 16, "block_sequences": 4, "edges": (0, 1, 4), "held_out_blocks": 2, "training_blocks": 2}
    return make_store(tmp_path_factory.mktemp("graph") / "store", tokenizer=True, **sizes)  # type: ignore[arg-type]


def train(command, store: SyntheticStore, runs: Path, device: str, **changes: object) -> Outcome:
    values = FEW | {"device": device} | {name.replace("__", "."): value for name, value in changes.items()}
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return command("run", "--store", store.path, "--runs", runs, "--name", "run", *options)


@pytest.mark.slow
def test_a_run_of_graphs_is_that_of_single_operations_bit_for_bit(
    command, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a replayed step asks nothing of the host but a few numbers and the rows' copy, from pinned memory."""
    asked: dict[int, tuple[list[str], int, list[str]]] = {}
    step_of = Trainer._step

    def watched(self: Trainer, step: int) -> object:
        log.clear()
        out = step_of(self, step)
        if [op.name for op in log.ops].count("graph"):
            asked[step] = [op.name for op in log.ops], len(log.copies), list(log.syncs)
        return out

    monkeypatch.setattr(Trainer, "_step", watched)
    with fake_cuda() as log:
        for choice in ("on", "off"):
            done = train(command, store, tmp_path / choice, "cuda:1", step_graph=choice)
            assert (done.code, log.faults) == (0, []), done.err
            assert ("a step is one CUDA graph" in done.err) == (choice == "on")
    assert_same_run(*(tmp_path / choice / "run" for choice in ("on", "off")))
    assert sorted(asked) == [2, 3, 4, 6]  # not where k or pairs are others than in the step before
    timing = (tmp_path / "on/run/timing.jsonl").read_text().splitlines()
    assert json.loads(timing[-1])["steps_replayed"] == len(asked)
    replayed = [ops for ops, _, syncs in asked.values() if not syncs]  # recording waits once
    assert replayed
    for ops in replayed:
        assert len(ops) < 40 and set(ops) <= {"graph", "fill_", "copy_", "_to_copy"}


@pytest.mark.slow
def test_recorded_steps_go_on_with_the_weights_of_latents_that_were_merged(
    command, store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = Single(np.array([1.0, 0.0]), 0.0, 0.1, np.array([1.0, 1.0]), refitted=False)
    pair = Judged([3, 5], Cost(single, 0.0, 0.0, 0.0), 0.0, 0.0)
    monkeypatch.setattr(merge_latents, "find_groups", lambda *_: ([pair], None))
    merge = {"diversity__merge__at": "[0.5]", "diversity__mined__weight": 0, "diversity__co_activation__weight": 0}
    with fake_cuda() as log:
        for choice in ("on", "off"):
            done = train(command, store, tmp_path / choice, "cuda:1", step_graph=choice, **merge)
            assert (done.code, log.faults) == (0, []), done.err
    whole = tmp_path / "on" / "run"
    assert_same_run(whole, tmp_path / "off" / "run")
    assert rows(whole)[-1]["merged"] == {"4": 1}


def test_a_step_that_cannot_be_recorded_is_said_or_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(self: FakeGraph) -> Any:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(FakeGraph, "record", fail)
    with fake_cuda():
        for choice in ("auto", "on"):
            graph, done = StepGraph(torch.device("cuda"), choice), list[Any]()
            with nullcontext() if choice == "auto" else pytest.raises(ProjectError, match="or lower rows.batch_rows"):
                for step in range(3):
                    graph.run(step, "same", [torch.ones(2, device="cuda")], done.append)  # type: ignore[arg-type]
            assert (len(done), graph.replayed) == (3 if choice == "auto" else 1, 0)
    said = capsys.readouterr().err
    assert said.count("could not be recorded as a CUDA graph (there is too little memory)") == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kernels": "plain"}, "kernels = plain"),
        ({"auxk__row_stride": 3}, "not a multiple of auxk.row_stride"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_where_it_is_asked_for(
    command, store, tmp_path: Path, changes: dict, why: str
) -> None:
    with fake_cuda():
        done = train(command, store, tmp_path, "cuda", step_graph="on", **changes)
    assert done.code == 2 and why in done.err


def test_a_graph_of_the_fake_device_refuses_what_cuda_refuses_and_repeats_on_the_same_memory() -> None:
    with fake_cuda() as log:
        here, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")

        def recorded(body: Callable[[], object]) -> Any:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                body()
            return graph

        graph = recorded(lambda: total.add_(here * 2))
        assert total.cpu().tolist() == [0.0, 0.0]  # recording runs nothing
        for _ in range(3):
            graph.replay()
            here.add_(1)
        assert total.cpu().tolist() == [12.0, 12.0]
        assert [op.name for op in graph.kernels] == ["mul", "add_"]
        for wrong in (lambda: here.sum().item(), lambda: torch.tensor([1.0], device="cuda"), lambda: here.cpu()):
            with pytest.raises(DeviceFault):
                recorded(wrong)
        inputs = [torch.ones(2, device="cuda")]
        stale = recorded(lambda: total.add_(inputs[0]))
        inputs.clear()
        with pytest.raises(DeviceFault, match="given back"):
            stale.replay()
        assert len(log.faults) == 4
