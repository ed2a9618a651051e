"""Damaged rows of a store, through every command that reads them: named by shard and row, and never figures."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from shared.errors import CorruptData, ProjectError
from shared.store.checks import read_ledger
from shared.store.layout import ARRAYS
from shared.store.statistics import row_norms
from shared.store.store import Store
from tests.llms import command as harvest
from tests.runs import SMALL, Outcome
from tests.stores import SyntheticStore, record_as_it_is
from train.evaluation.evaluate import ratio

Command = Callable[..., Outcome]
BITS = {"nan": 0x7FC0, "inf": 0x7F80, "1e30": 0x7149, "2.6e38": 0x7F43, "1e18": 0x5D5E}
"""Values as bits of bfloat16."""


def shard(store: Path, side: str, block: int) -> Path:
    return store / ARRAYS / f"strata/004-016/{side}/c/{block}/0"


def damage(path: Path, value: int, row: int = 3, width: int = 16) -> None:
    """Overwrite the third value of a row."""
    data = bytearray(path.read_bytes())
    at = 2 * (row * width + 2)
    data[at : at + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(pristine: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a store that has the same digest wherever it lies."""
    from tests.reports import train

    runs = tmp_path_factory.mktemp("runs")
    train("run", "--store", pristine.path, "--runs", runs, "--name", "run", "--steps", "8", *SMALL)
    return runs / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs/run"))


def one_line(done: Outcome, path: Path, *said: str, code: int = 1) -> None:
    assert done.code == code, done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert str(path) in done.err and all(word in done.err for word in said), done.err


@pytest.mark.fault(42)
@pytest.mark.parametrize("value", BITS)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_flipped_bit_of_a_held_out_row_is_named_by_its_checksum(
    synthetic: SyntheticStore, run: Path, command: Command, side: str, value: str
) -> None:
    path = shard(synthetic.path, side, 1)
    damage(path, BITS[value])
    one_line(command("evaluate", run, "--store", synthetic.path, "--json"), path, "crc32c", "harvest repair")


@pytest.mark.fault(42)
@pytest.mark.parametrize("value", BITS)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_held_out_row_that_the_statistics_do_not_allow_is_named(
    synthetic: SyntheticStore, run: Path, command: Command, side: str, value: str
) -> None:
    """With checksums that agree."""
    path = shard(synthetic.path, side, 1)
    damage(path, BITS[value], width=16 if side == "source" else 24)
    record_as_it_is(synthetic.path, path)
    for line in ("evaluate", "report") if value == "nan" else ("evaluate",):
        said = "not finite" if value in ("nan", "inf") else "statistics allow"
        one_line(command(line, run, "--store", synthetic.path), path, "row 3 ", said, "harvest repair")


@pytest.mark.fault(42)
@pytest.mark.parametrize("block", [1, 3])
def test_damaged_rows_stop_run_resume_compare_samples_and_the_measure_of_the_shuffle(
    synthetic: SyntheticStore, run: Path, command: Command, tmp_path: Path, block: int
) -> None:
    path, store = shard(synthetic.path, "source", block), ("--store", synthetic.path)
    for row in range(path.stat().st_size // 40):
        damage(path, BITS["1e18"], row=row)
    record_as_it_is(synthetic.path, path)
    fresh = command("run", *store, "--runs", tmp_path / "new", "--steps", "400", *SMALL)
    one_line(fresh, path, "statistics allow")
    if block == 1:
        one_line(command("compare", run, *store), synthetic.path, f"block {block} holds other rows", code=2)
    else:
        one_line(command("samples", run, *store), path, "statistics allow")
        shuffled = harvest("info", synthetic.path, "--shuffle")
        assert shuffled.code == 1 and str(path) in shuffled.err and "variance" not in shuffled.out
        shutil.rmtree(run / "checkpoints")
        one_line(command("resume", run, *store), synthetic.path, f"block {block} holds other rows", code=2)


@pytest.mark.fault(42)
def test_a_sample_of_shard_files_is_read_and_all_with_verify(
    synthetic: SyntheticStore, run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store larger than what is read by itself, some files each time."""
    path = shard(synthetic.path, "position", 2).parent
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    half = sum(file.bytes for file in read_ledger(synthetic.path, 2).files.values()) // 2
    monkeypatch.setattr("shared.store.store.CHECKED_BYTES", half)
    found = []
    for _ in range(100):
        try:
            Store.open(synthetic.path).check_shards(range(2, 5))
        except CorruptData as error:
            found.append(str(error))
    assert 0 < len(found) < 60 and all(str(path) in said for said in found)
    with pytest.raises(CorruptData, match="crc32c"):
        Store.open(synthetic.path).check_shards(range(2, 5), everything=True)
    one_line(command("evaluate", run, "--store", synthetic.path, "--verify"), path, "crc32c")


def test_a_row_may_be_as_long_as_the_longest_of_its_block_and_no_longer(finished: Path) -> None:
    """Of a harvested store, every block of which has a histogram of norms."""
    opened = Store.open(finished)
    for block in range(opened.record.blocks):
        tensors = load_file(finished / f"ledger/{block:06d}.moments.safetensors")
        for name, part in opened.strata.items():
            for side in ("source", "target"):
                limit = opened.longest_norm(block, name, side)
                last = int(tensors[f"{name}/{side}/bins"].max())
                assert limit == pytest.approx(2.0 ** (-32 + (last + 1) / 64), rel=2e-3)
                first = block * part.stratum.rows
                norms = row_norms(opened._block_rows(block, name, side))
                numbers = np.arange(first, first + len(norms))
                opened.check_norms(name, side, numbers, norms)
                norms[-1] = limit * 1.01
                with pytest.raises(CorruptData, match="statistics allow"):
                    opened.check_norms(name, side, numbers, norms)


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    "figures", [(np.nan, 1, 1), (np.inf, 1, 1), (1, np.nan, 1), (1, np.inf, np.inf), (0, 0, np.nan)]
)
def test_a_ratio_makes_no_number_of_what_is_not_finite(figures: tuple[float, float, float]) -> None:
    with pytest.raises(ProjectError, match="not finite"):
        ratio(*figures)
