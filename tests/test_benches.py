"""Every bench runs, on sizes that take seconds: it is found by its file, and its figures go to a temporary folder.

Left out: other trainers, whose packages are not installed here and for which a small trainer stands in; the second
thread, as tests have one; and the compiling of kernels, which has a test of its own (`tests/gpu/test_compile.py`).
Figures mean nothing, but that each was measured.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.forks import Forks
from tests.stores import make_store

FOLDER = Path(__file__).parent / "bench"
PARTS = {
    "__init__",
    "record",
    "peer_worker",
    "peer_training",
    "peer_saving",
    "live_worker",
    "pictures",
    "judge",
    "same_rows",
    "real_model",
    "gpu_setup",
    "gpu_checks",
    "gpu_dense",
    "gpu_commands",
}
"""What is no bench, but of one; and what downloads a model, which has a test of its own."""
COMMANDS: dict[str, list[str]] = {
    "checkpoints": ["STORE", "large"],
    "diversity": [
        "narrow --arms baseline full --seeds 1 --jobs 1",
        "given --store STORE --arms full --seeds 2 --jobs 1",
    ],
    "duplicates": ["report", "terms", "samples RUN"],
    "gpu": ["kernels", "step dense peers profile", "run", "harvest"],
    "gpu_counts": ["steps memory"],
    "harvest": ["speed", "writing", "packing", "memory"],
    "initialisation": ["STORE"],
    "interchange": ["export RUN", "stores"],
    "objects": ["STORE"],
    "pages": ["RUN"],
    "parity": ["STORE --work WORK"],
    "pipeline": ["trained"],
    "planted": ["--arms baseline --seeds 1"],
    "probe": ["RUN"],
    "redundancy": ["--seeds 1", "RUN"],
    "recipe": ["synthetic STORE --arms recipe before --seeds 0 1 --work WORK"],
    "scaling": ["synthetic STORE --work WORK"],
    "same_answer": ["--store STORE --k 6 --d-sae 64 --seeds 1 --most 1 --work WORK"],
    "splice": ["TRAINED_ON_TEXT --model MODEL"],
    "step": ["", "threads"],
    "storage_types": ["synthetic STORE --seeds 0 --work WORK"],
    "sweep": ["STORE"],
}
"""What each is told, if anything; a word in capitals is what tests make for it."""
IMPORTED = (
    *("torch", "torch._dynamo", "numba.np.ufunc.parallel", "transformer_lens", "datasets", "zarr"),
    *("transformers.models.gemma2.modeling_gemma2", "harvest.cli", "harvest.run.pipeline", "harvest.llm.model"),
    *("train.cli", "train.commands", "train.evaluation.evaluate", "train.run.trainer", "tests.stores", "tests.llms"),
)
POSITIVE = {
    "s",
    "ms",
    "tokens/s",
    "rows/s",
    "rows/CPU-s",
    "MB/s",
    "GB/s",
    "1/s",
    "times as fast",
    "B",
    "bytes",
    "tokens",
    "operations",
}
"""Units of what is measured, and not the difference of two."""


def benches() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)


def commands() -> list[Any]:
    return [
        pytest.param(name, rest.split(), id=f"{name} {rest}".strip())
        for name in benches()
        for rest in COMMANDS.get(name, [""])
    ]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(*IMPORTED) as made:
        yield made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("benches") / "store", tokenizer=True).path


@pytest.mark.parametrize("name", benches())
def test_every_bench_has_sizes_that_take_seconds(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert "sized(" in text and "record(" in text


@pytest.mark.slow
def test_documents_are_left_alone_where_benches_only_show_that_they_run(tmp_path: Path, forks: Forks) -> None:
    done = forks.run("tests.bench.kernels", scratch=tmp_path, env={"BENCH_SMOKE": str(tmp_path / "figures")})
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"benchmarks.json", "benchmarks.md"}


@pytest.mark.slow(20)  # all of them, although many take less: what they fork takes longer to begin
@pytest.mark.parametrize(("name", "rest"), commands())
def test_a_bench_runs(
    name: str, rest: list[str], forks: Forks, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    env = {"BENCH_SMOKE": str(tmp_path / "figures")}
    if name in ("pages", "pipeline"):
        env["CHROMIUM"] = chromium()
    made = {
        "STORE": lambda: store,
        "WORK": lambda: tmp_path / "work",
        "RUN": lambda: request.getfixturevalue("trained"),
        "TRAINED_ON_TEXT": lambda: request.getfixturevalue("trained_on_text"),
        "MODEL": lambda: request.getfixturevalue("model"),
    }
    words = [made[word]() if word in made else word for word in rest]
    done = forks.run(f"tests.bench.{name}", *words, scratch=tmp_path, env=env)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "figures" / "benchmarks.json").read_text())
    assert all(math.isfinite(figure["value"]) for figure in figures), figures
    assert any(figure["value"] > 0 for figure in figures), figures
    measured = [figure for figure in figures if figure["unit"] in POSITIVE or "fvu" in figure["name"].split()]
    # Of a step without rows that are left out, none are for those.
    assert all(figure["value"] > 0 for figure in measured if "silent rows" not in figure["name"]), measured
    assert all(figure["command"].startswith(f"python -m tests.bench.{name}") for figure in figures)
    page = (tmp_path / "figures" / "benchmarks.md").read_text()
    assert all(figure["name"] in page for figure in figures)
