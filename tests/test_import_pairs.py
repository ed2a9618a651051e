"""`harvest import`: rows that other software wrote become a store that trains, and nothing wrong gets in."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harvest.imports.import_pairs import repair_from
from harvest.writer import ledger
from shared.errors import UserError
from shared.store.checks import read_request
from shared.store.statistics import decode
from shared.store.store import Store
from tests.imported_rows import S, T, expected_rows, flat, imported, pairs, rows_of, write_npy
from tests.llms import command, contents, refused
from tests.runs import SMALL
from tests.stores import make_store


def test_every_row_is_stored_with_its_token_and_position(tmp_path: Path) -> None:
    arrays = pairs()
    done = imported(write_npy(tmp_path / "rows", arrays), tmp_path / "cache")
    assert done.code == 0 and "the last 6 of 70 sequences do not fill a block" in done.err
    store = Store.open(done.store)
    assert rows_of(store) == expected_rows(arrays, 64)
    held_out = np.concatenate([store.documents.shard(i)[:, 0] for i in range(2)])
    assert sorted(held_out.tolist()) == list(range(32))
    assert store.request.bos and store.request.imported and len(store.request.imported.files) == 6
    again = imported(tmp_path / "rows", tmp_path / "cache")
    assert again.store == done.store and "import" not in again.err.split("hash")[0]


@pytest.mark.parametrize("shape", ["sequences", "rows"])
def test_safetensors_of_either_shape_hold_the_same(tmp_path: Path, shape: str) -> None:
    arrays = pairs() if shape == "sequences" else flat(pairs())
    (tmp_path / "rows").mkdir()
    for number in range(2):
        part = slice(len(arrays["source"]) // 2 * number, len(arrays["source"]) // 2 * (number + 1))
        tensors = {name: torch.from_numpy(rows[part].copy()) for name, rows in arrays.items()}
        tensors |= {name: tensors[name].bfloat16() for name in ("source", "target")}
        save_file(tensors, tmp_path / "rows" / f"{number}.safetensors")
    more = ("--context-size", T) if shape == "rows" else ()
    done = imported(tmp_path / "rows", tmp_path / "cache", *more, kind="safetensors")
    assert done.code == 0, done.err
    assert rows_of(Store.open(done.store)) == expected_rows(pairs(), 64)


def test_a_file_that_ends_within_a_sequence_is_refused(tmp_path: Path) -> None:
    arrays = flat(pairs())
    for number, part in enumerate((slice(0, 1000), slice(1000, S * T))):
        (tmp_path / "rows").mkdir(exist_ok=True)
        for name, rows in arrays.items():
            np.save(tmp_path / "rows" / f"{name}{number}.npy", rows[part])
    done = imported(tmp_path / "rows", tmp_path / "cache", "--context-size", T)
    refused(done, "source0.npy: 1,000 rows are not a whole number of sequences of 32 tokens", folder=tmp_path / "cache")


def test_our_own_rows_come_back_with_the_same_statistics(tmp_path: Path) -> None:
    """Through .npy files in order of their windows: the same rows are held out, and the same are trained on."""
    made = make_store(tmp_path / "made", training_blocks=3)
    ours, request = Store.open(made.path), made.record.request
    sequences = made.record.blocks * request.block_sequences
    arrays = {name: np.zeros((sequences, T, d), np.float32) for name, d in (("source", 16), ("target", 24))}
    for stratum in ours.strata:
        place = tuple(made.arrays[f"strata/{stratum}/{name}"].astype(int) for name in ("sequence", "offset"))
        for side, rows in arrays.items():
            rows[place] = made.values(f"strata/{stratum}/{side}")
    arrays["tokens"] = made.arrays["tokens"]
    done = imported(
        write_npy(tmp_path / "rows", arrays), tmp_path / "cache", "--set", f"store.edges={list(request.edges)}"
    )
    assert done.code == 0, done.err
    theirs = Store.open(done.store)
    assert rows_of(theirs) == expected_rows(arrays, sequences)
    for name, sides in ours.statistics.items():
        for side, expected in sides.items():
            found = theirs.statistics[name][side]
            np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)  # sums of float32
            np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        (*ours.record.strata, ours.record.overall), (*theirs.record.strata, theirs.record.overall), strict=True
    ):
        assert (a.rows, a.natural_rows, a.source.norm_quantiles, a.target.norm_quantiles) == (
            b.rows, b.natural_rows, b.source.norm_quantiles, b.target.norm_quantiles
        )  # fmt: skip


@pytest.mark.slow
def test_an_imported_store_is_the_models_and_trains_samples_and_reports(
    finished: Path, model: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    """A harvest's rows by way of safetensors: the model, asked again, gives them at their tokens and positions."""
    from tests.llms import command as harvest

    store = Store.open(finished)
    context = store.request.context_size
    windows = np.concatenate([store.tokens.shard(i) for i in range(store.record.blocks)])
    tensors = {"ids": torch.from_numpy(windows.copy())}
    for side, d in (("source", store.record.d_in), ("target", store.record.d_out)):
        rows = torch.zeros(len(windows), context, d, dtype=torch.bfloat16)
        for part in store.strata.values():
            for shard in range(part.source.rows // part.source.spec.rows_per_shard):
                place = tuple(torch.from_numpy(a.shard(shard).astype(np.int64)) for a in (part.sequence, part.offset))
                rows[place] = torch.from_numpy(decode(getattr(part, side).shard(shard))).bfloat16()
        lost = (rows == 0).all(dim=-1)
        assert not lost[:, 1:].any()  # all windows start with one and the same row, of which some are stored
        rows[lost] = rows[~lost[:, 0], 0][0]
        tensors[getattr(store.request, f"{side}_hook")] = rows
    save_file(tensors, tmp_path / "rows.safetensors")
    names = ("--source", store.request.source_hook, "--target", store.request.target_hook, "--tokens", "ids")
    size = ("--set", f"store.block_sequences={store.request.block_sequences}", "--model", model)
    line = ("import", tmp_path / "rows.safetensors", "--format", "safetensors", "--cache", tmp_path / "cache")
    path = harvest(*line, *names, *size, "--name", "mine").store
    assert path.name.startswith(f"mine-L{store.request.layer}-")
    for action in (
        ("verify", path, "--against-model", 40, "--model", model),
        ("info", path),
        ("ls", "--cache", tmp_path / "cache"),
    ):
        done = harvest(*action)
        assert done.code == 0, done.err + done.out
    run = command("run", "--store", path, "--runs", tmp_path / "runs", "--steps", 30, *SMALL).path
    assert (run / "samples" / "step-000030.parquet").is_file()
    assert command("report", run).code == 0
    assert (run / "report.html").is_file()


def test_rows_without_sequences_have_one_stratum_and_say_what_that_costs(tmp_path: Path, command: Any) -> None:
    arrays = flat(pairs())
    folder = write_npy(tmp_path / "rows", {name: arrays[name] for name in ("source", "target")})
    done = imported(folder, tmp_path / "cache", "--set", "store.block_sequences=2")
    assert done.code == 0, done.err
    assert "there are no position strata" in done.err and "there are no token ids" in done.err
    store = Store.open(done.store)
    assert list(store.strata) == ["000-256"] and store.request.imported and not store.request.imported.positions
    run = command("run", "--store", done.store, "--runs", tmp_path / "runs", "--steps", 20, *SMALL)
    assert run.code == 0, run.err


@pytest.mark.fault(59)
def test_an_import_that_is_cut_off_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_npy(tmp_path / "rows", pairs())
    whole = imported(folder, tmp_path / "whole").store
    commit = ledger.commit

    def cut_off(target: Any, block: int, *rest: Any) -> Any:
        if block == 2:
            raise KeyboardInterrupt
        return commit(target, block, *rest)

    monkeypatch.setattr(ledger, "commit", cut_off)
    assert imported(folder, tmp_path / "cache").code != 0
    begun = tmp_path / "cache" / whole.name
    kept = {name: (begun / name).stat().st_mtime_ns for name in ("ledger/000000.json", "ledger/000001.json")}
    monkeypatch.undo()
    assert imported(folder, tmp_path / "cache").code == 0
    assert contents(begun) == contents(whole)
    assert all((begun / name).stat().st_mtime_ns == time for name, time in kept.items())


@pytest.mark.fault(59)
def test_damage_is_repaired_from_the_same_files_and_no_others(tmp_path: Path) -> None:
    folder = write_npy(tmp_path / "rows", pairs())
    path = imported(folder, tmp_path / "cache").store
    before = contents(path)
    for name in ("strata/004-016/source/c/3/0", "tokens/c/1/0"):
        file = path / "activations.zarr" / name
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    refused(command("repair", path), "repaired from the same files", "--from PATH")
    other = pairs()
    other["target"][3, 3, 3] += 1
    wrong = write_npy(tmp_path / "wrong", other)
    done = command("repair", path, "--from", wrong)
    assert done.code == 2 and "was imported from other files: target-9.npy" in done.err
    request = read_request(path)
    with pytest.raises(UserError, match="pass the files and the --model that it was imported with"):
        repair_from(path, request.model_copy(update={"bos": not request.bos}), [folder], None)
    assert command("repair", path, "--from", folder).code == 0
    assert contents(path) == before
    assert command("verify", path).code == 0


def test_a_store_without_a_model_cannot_be_compared_with_one(tmp_path: Path) -> None:
    path = imported(write_npy(tmp_path / "rows", pairs()), tmp_path / "cache").store
    refused(command("verify", path, "--against-model", 3), "imported without --model")


@pytest.mark.fault(59)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    arrays = pairs()
    arrays["target"][50, 7, 3] = value
    done = imported(write_npy(tmp_path / "rows", arrays), tmp_path / "cache")
    assert done.code == 1
    assert "target-10.npy: sequence 15, position 7 is not finite" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err and not list((tmp_path / "cache").glob("*/store.json"))


def test_a_value_that_the_storage_type_cannot_hold_is_named(tmp_path: Path) -> None:
    arrays = pairs()
    arrays["source"][1, 2, 3] = 1e6
    done = imported(write_npy(tmp_path / "rows", arrays), tmp_path / "cache", "--set", "store.storage=float16")
    assert done.code == 1 and "source-9.npy: sequence 1, position 2 is not finite as float16" in done.err


def lose_rows(folder: Path) -> None:
    np.save(folder / "target-10.npy", pairs()["target"][35:69])


def lose_file(folder: Path) -> None:
    (folder / "target-10.npy").unlink()


def cut(folder: Path) -> None:
    data = (folder / "source-9.npy").read_bytes()
    (folder / "source-9.npy").write_bytes(data[: len(data) // 2])


def pickle_it(folder: Path) -> None:
    np.save(folder / "source-9.npy", np.array([{}], object), allow_pickle=True)


def other_width(folder: Path) -> None:
    np.save(folder / "source-10.npy", pairs()["source"][35:, :, :5])


def integers(folder: Path) -> None:
    np.save(folder / "source-9.npy", pairs()["source"][:35].astype(np.int64))


def negative(folder: Path) -> None:
    np.save(folder / "tokens-9.npy", -pairs()["tokens"][:35])


def other_tokens(folder: Path) -> None:
    np.save(folder / "tokens-9.npy", pairs()["tokens"][:35, :5])


REFUSED: list[tuple[Callable[[Path], None], tuple[object, ...], tuple[str, ...]]] = [
    (lose_rows, (), ("source-10.npy: 1,120 rows", "target-10.npy is of 1,088")),
    (lose_file, (), ("holds 1 files target*.npy", "source-10.npy")),
    (cut, (), ("source-9.npy: not a .npy file of numbers",)),
    (pickle_it, (), ("source-9.npy: not a .npy file of numbers",)),
    (other_width, (), ("source-10.npy has rows of float32 [32, 5]", "[32, 16]")),
    (integers, (), ("source-9.npy is of type int64",)),
    (negative, (), ("tokens-9.npy holds -299 to 0",)),
    (other_tokens, (), ("tokens-9.npy is of 175",)),
    (shutil.rmtree, (), ("nothing is at",)),
    (lambda folder: None, ("--source", "resid"), ("holds 0 files resid*.npy",)),
    (lambda folder: None, ("--context-size", 16), ("sequences have different lengths", "16 by --context-size")),
    (lambda folder: None, ("--set", "store.block_sequences=256"), ("70 sequences", "take 768")),
    (lambda folder: None, ("--set", "store.unembedding=true"), ("unembedding",)),
]


@pytest.mark.fault(59)
@pytest.mark.parametrize(("spoil", "more", "parts"), REFUSED)
def test_files_that_cannot_be_pairs_are_one_error_and_no_store(
    tmp_path: Path, spoil: Callable[[Path], None], more: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    folder = write_npy(tmp_path / "rows", pairs())
    spoil(folder)
    done = imported(folder, tmp_path / "cache", *more)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert not list((tmp_path / "cache").glob("*/*"))


@pytest.mark.fault(59)
def test_a_safetensors_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_file({name: torch.from_numpy(rows) for name, rows in pairs().items()}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-9])
    done = imported(tmp_path / "a.safetensors", tmp_path / "cache", kind="safetensors")
    refused(done, "a.safetensors: not a safetensors file", folder=tmp_path / "cache")
