"""Settings of every test: threads, no network, nothing written outside temporary folders.

They are environment variables, set here before numpy or torch is imported, and subprocesses inherit them.

One thread for every pool, always. Sums are then taken in one order on every machine, so figures repeat, and tests that
start several processes keep their cores: on two busy cores a second OpenMP thread made a 64 x 16 matrix product 1,500
times slower (it waits by spinning) and a 2,048 x 256 one 2 times.

Nothing waits for the disk in the tests' own process: a small harvest forces files and folders to it 573 times, and a
power cut would end the tests, too. That they are forced, and in which order, is tested by the calls themselves
(`test_durable.py`); what a power cut leaves, by processes that do wait (`faults/test_power.py`).
"""

import os
import secrets
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in a shell's background; the processes of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

THREADS = "1"
for pool in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA"):
    os.environ[f"{pool}_NUM_THREADS"] = THREADS

_SCRATCH = tempfile.mkdtemp(prefix="transcoder-cache-tests-")
os.environ |= {
    "XDG_CACHE_HOME": os.path.join(_SCRATCH, "cache"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_CACHE": os.path.join(_SCRATCH, "datasets"),
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "TRITON_INTERPRET": "1",
}

import pytest  # noqa: E402

from tests.forks import do_not_wait  # noqa: E402
from tests.stores import SyntheticStore, make_store  # noqa: E402
from train.model.kernels.base import SparseOps  # noqa: E402
from train.model.kernels.sparse_ops import sparse_ops  # noqa: E402

os.fsync = do_not_wait  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.browsed import Browsed
    from tests.llms import Line
    from tests.object_server import Bucket
    from tests.runs import Outcome
    from train.report.report_record import Report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a slip shows within seconds. Then slow ones: what takes longest begins first, by modules.

    So the last tests are short, and no worker goes on alone for long; a module's tests stay together for its fixtures.
    """
    longest: dict[Path, int] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0), _seconds(item))
    items.sort(key=lambda item: (_seconds(item) > 0, -longest[item.path] if _seconds(item) else 0))


def _seconds(item: pytest.Item) -> int:
    """About how long a slow test takes; 0 of one that is not slow."""
    mark = item.get_closest_marker("slow")
    return 0 if mark is None else mark.args[0] if mark.args else 5


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> SparseOps:
    """The operations of a name; Triton's run in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    return sparse_ops(request.param)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """A finished store that no test changes: three training blocks and two held out."""
    return make_store(tmp_path_factory.mktemp("pristine") / "store")


@pytest.fixture
def synthetic(tmp_path: Path, pristine: SyntheticStore) -> SyntheticStore:
    """A copy of `pristine` for one test, to change at will."""
    shutil.copytree(pristine.path, tmp_path / "store")
    return replace(pristine, path=tmp_path / "store")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.llms import make_gemma

    return make_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.llms import texts, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("texts") / "text.jsonl", [{"text": one} for one in texts(80)])


@pytest.fixture(scope="session")
def small(model: Path, text: Path) -> "Line":
    """The arguments of a harvest of one second."""
    from tests.llms import Line

    return Line(model, text)


@pytest.fixture(scope="session")
def finished(small: "Line", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests only read."""
    from tests.llms import command

    return command(*small(tmp_path_factory.mktemp("cache"))).store


@pytest.fixture(scope="session")
def trained_on_text(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on it, that tests only read."""
    from tests.reports import train
    from tests.runs import SMALL

    runs = tmp_path_factory.mktemp("runs")
    train("run", "--store", finished, "--runs", runs, "--name", "run", "--steps", 6, *SMALL)
    return runs / "run"


@pytest.fixture(scope="session")
def longer(small: "Line", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of ten blocks, made without a stop."""
    from tests.llms import BLOCK_TOKENS, command

    return command(*small(tmp_path_factory.mktemp("cache"), tokens=8 * BLOCK_TOKENS)).store


@pytest.fixture(scope="session")
def report_store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6, tokenizer=True)


@pytest.fixture(scope="session")
def trained(report_store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a report, that tests copy."""
    from tests.reports import OPTIONS, train

    runs = tmp_path_factory.mktemp("runs")
    train("run", "--store", report_store.path, "--runs", runs, "--name", "run", *OPTIONS)
    return runs / "run"


@pytest.fixture(scope="session")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, that tests only read."""
    from tests.reports import train

    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("reported") / "run"))
    train("report", run)
    return run


@pytest.fixture(scope="session")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> "Browsed":
    """A run with the files of its browser of latents, that tests only read."""
    from tests.browsed import browse

    return browse(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def one_browser() -> "Iterator[None]":
    """One browser for all pages of a module."""
    from tests import browser

    with browser.one_browser():
        yield


@pytest.fixture
def report(reported: Path) -> "Report":
    from tests.reports import read

    return read(reported)


@pytest.fixture(scope="session")
def object_server() -> "Iterator[str]":
    """An S3 server's address, the same for all tests."""
    from tests.object_server import serving

    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(object_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Bucket]":
    """An empty bucket, behind a proxy that lets all requests pass; the environment says where it is."""
    from tests.object_server import SETTINGS, Bucket, Proxy, make_bucket

    name = f"bucket-{secrets.token_hex(6)}"
    make_bucket(object_server, name)
    with Proxy(object_server) as proxy:
        for key, value in {**SETTINGS, "AWS_ENDPOINT_URL": proxy.address, "TMPDIR": str(tmp_path)}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        yield Bucket(f"s3://{name}", proxy)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Callable[..., Outcome]":
    """Runs `python -m train ARGS` in this process."""

    from shared import command_line
    from tests.runs import Outcome
    from train.cli import main

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, args)])
        code = 0
        try:
            command_line.run(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
