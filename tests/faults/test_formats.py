"""Formats: a store of format 3 is read for ever; what is newer is named and asks for an upgrade."""

import json
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from pydantic import ValidationError

from shared.store.layout import ARRAYS, FORMAT_VERSION
from shared.store.mapped_array import RowArray
from shared.store.store import Local, Store
from tests.llms import command, contents
from tests.stores import SyntheticStore, edit, stock_rows

STORE_3 = Path(__file__).parent / "fixtures" / "store-format-3"
CHECKSUMS = {
    "tokens": "82e25eef",
    "documents": "70baa97d",
    "strata/000-001/source": "3a90cb49",
    "strata/000-001/target": "18d65e1e",
    "strata/000-001/position": "84fbecee",
    "strata/000-001/sequence": "a7c26259",
    "strata/000-001/offset": "84fbecee",
    "strata/001-004/source": "8a870612",
    "strata/001-004/target": "4a48a4d5",
    "strata/001-004/position": "7db61d15",
    "strata/001-004/sequence": "93bba553",
    "strata/001-004/offset": "7db61d15",
    "strata/004-008/source": "f01841d0",
    "strata/004-008/target": "39d30ce3",
    "strata/004-008/position": "680ca592",
    "strata/004-008/sequence": "83cce2c7",
    "strata/004-008/offset": "680ca592",
}
"""crc32c of all rows, as they were when the store was written."""


def rows(array: RowArray) -> np.ndarray:
    out = np.zeros((array.rows, *([array.spec.width] if array.spec.width else [])), array.spec.dtype)
    array.read(0, array.rows, out)
    return out


def arrays(store: Store) -> dict[str, np.ndarray]:
    found = {"tokens": rows(store.tokens), "documents": rows(store.documents)}
    for name, stratum in store.strata.items():
        for kind in ("source", "target", "position", "sequence", "offset"):
            found[f"strata/{name}/{kind}"] = rows(getattr(stratum, kind))
    return found


@pytest.mark.fault(24)
def test_a_store_of_format_3_is_read_for_ever() -> None:
    store = Store.open(STORE_3)
    record = store.record
    assert (record.format_version, record.blocks, record.d_in, record.d_out) == (3, 3, 8, 8)
    assert (record.training_blocks, record.report_blocks) == (range(1, 3), range(0, 1))
    assert record.request.digest == "11d443a892467cefe3a4033e2612c073e92ff15e5278598cc01a84cef36570db"
    assert [(s.name, s.rows) for s in record.plan.stored_strata] == [("000-001", 4), ("001-004", 24), ("004-008", 32)]
    found = arrays(store)
    assert {name: f"{google_crc32c.value(values.tobytes()):08x}" for name, values in found.items()} == CHECKSUMS
    assert found["tokens"][0].tolist() == [2, 279, 289, 289, 281, 289, 288, 263]
    assert found["documents"][-1].tolist() == [2] * 8
    bits = [48894, 49047, 16095, 15751, 49051, 49028, 16185, 16159]
    assert found["strata/004-008/source"][33].tolist() == bits
    assert found["strata/004-008/position"][33] == 4 and found["strata/004-008/sequence"][33] == 13
    overall = store.statistics["overall"]["target"]
    assert overall.mean[:3].tolist() == [0.04240594591413225, 0.2522915455379656, 0.7776873532150473]
    assert overall.variance[:3].tolist() == [0.876395038885722, 0.37505899595541564, 0.297672543408769]
    assert (record.overall.rows, record.overall.source.mean_squared_norm) == (112, 20.343390510036624)


@pytest.mark.fault(24)
def test_commands_read_a_store_of_format_3(tmp_path: Path) -> None:
    shutil.copytree(STORE_3, tmp_path / "store")
    assert json.loads(command("verify", tmp_path / "store", "--json").out)["faults"] == []
    facts = json.loads(command("info", tmp_path / "store", "--json").out)
    assert (facts["blocks"], facts["request"]["source_hook"]) == (3, "blocks.1.hook_resid_mid")
    found = arrays(Store.open(tmp_path / "store"))
    assert all((stock_rows(tmp_path / "store", name) == values).all() for name, values in found.items())
    assert command("pack", tmp_path / "store", tmp_path / "packed").code == 0
    packed = arrays(Store.open(tmp_path / "packed", Local(folder=tmp_path / "local")))
    assert all((packed[name] == values).all() for name, values in found.items())
    assert contents(tmp_path / "store") == contents(STORE_3)


@pytest.mark.fault(23)
@pytest.mark.parametrize(("name", "reads"), [("store.json", FORMAT_VERSION), ("packed.json", 1)])
def test_a_newer_store_asks_for_an_upgrade(synthetic: SyntheticStore, tmp_path: Path, name: str, reads: int) -> None:
    assert command("pack", synthetic.path, tmp_path / "packed").code == 0
    store = tmp_path / "packed" if name == "packed.json" else synthetic.path
    edit(store / name, lambda value: value.update(format_version=reads + 1, something={"new": [1]}))
    before = contents(store)
    for line in (("info", store), ("verify", store), ("repair", store), ("pack", store, tmp_path / "other")):
        done = command(*line)
        assert done.code == 2 and len(done.err.splitlines()) == 1
        if (line[0], name) != ("repair", "packed.json"):  # a packed store is not repaired, whatever its format
            assert f"{store}: written by format {reads + 1}, this reads {reads}; upgrade" in done.err
    assert contents(store) == before


@pytest.mark.fault(23)
def test_an_array_of_a_newer_zarr_format_is_named(synthetic: SyntheticStore) -> None:
    edit(synthetic.path / ARRAYS / "tokens/zarr.json", lambda value: value.update(zarr_format=4))
    done = command("info", synthetic.path)
    assert done.code == 1 and "tokens/zarr.json: zarr_format is 4, the store's records say 3" in done.err


@pytest.mark.fault(23)
def test_reports_and_samples_say_their_version_and_refuse_another() -> None:
    """The project only writes them; their models are what other readers validate with."""
    from train.compare.arms import Comparison
    from train.duplicates.correlation_report import CorrelationReport
    from train.samples.parquet import SamplesRecord

    models: tuple[Any, ...] = (Comparison, CorrelationReport, SamplesRecord)
    for model in models:
        assert model.model_fields["schema_version"].default == 1
        with pytest.raises(ValidationError) as error:
            model.model_validate({"schema_version": 2})
        assert any(e["loc"] == ("schema_version",) and e["msg"] == "Input should be 1" for e in error.value.errors())
