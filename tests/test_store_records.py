"""What `Store.open` and `Store.verify` catch in metadata and records, and what is no finished store."""

import shutil

import pytest

from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.store import layout
from shared.store.checks import file_crc32c, progress
from shared.store.store import Store
from tests.stores import cut, edit, faults, flip, make_store

SOURCE = "strata/004-016/source"
STATISTICS = layout.statistics_path(5)
SHARD = f"{layout.ARRAYS}/{SOURCE}/c/1/0"


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda data: data.update(data_type="int16"), "data_type"),
        (lambda data: data.update(data_type="float16"), "data_type"),
        (lambda data: data.update(fill_value=1), "fill_value"),
        (lambda data: data["shape"].__setitem__(0, 959), "shape"),
        (lambda data: data["shape"].__setitem__(1, 8), "shape"),
        (lambda data: data.update(shape=[960 * 16]), "shape"),
        (lambda data: data.update(shape="many"), "shape"),
        (lambda data: data["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 96), "chunk_grid"),
        (lambda data: data["codecs"][0]["configuration"].update(index_location="start"), "codecs"),
        (lambda data: data["attributes"].update(torch_dtype="float16"), "attributes"),
        (lambda data: data.pop("dimension_names"), "dimension_names"),
        (lambda data: data.update(extra=1), "keys"),
        (lambda data: data.clear(), "zarr_format"),
    ],
)
def test_open_catches_edited_metadata_and_names_the_key(synthetic, change, key):
    path = synthetic.path / layout.ARRAYS / SOURCE / "zarr.json"
    edit(path, change)
    with pytest.raises(CorruptData) as error:
        Store.open(synthetic.path)
    assert str(error.value).startswith(f"{path}: {key} is ")


@pytest.mark.fault(20)
@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"'])
def test_open_catches_metadata_that_is_no_object(synthetic, content):
    path = synthetic.path / layout.ARRAYS / SOURCE / "zarr.json"
    path.write_text(content)
    with pytest.raises(CorruptData, match=r"zarr\.json: "):
        Store.open(synthetic.path)


def test_a_longer_shape_is_allowed(synthetic):
    """An extension grows the arrays before the new `store.json`: readers of the old one go on."""
    edit(synthetic.path / layout.ARRAYS / SOURCE / "zarr.json", lambda data: data["shape"].__setitem__(0, 9600))
    assert Store.open(synthetic.path).strata["004-016"].source.rows == 960


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", ["tokens", SOURCE, "strata/016-032/sequence"])
def test_open_catches_deleted_metadata(synthetic, name):
    path = synthetic.path / layout.ARRAYS / name / "zarr.json"
    path.unlink()
    with pytest.raises(CorruptData, match=f"{path} is missing; run the same harvest to write it again"):
        Store.open(synthetic.path)


def test_open_catches_cut_or_missing_statistics(synthetic):
    cut(synthetic.path / STATISTICS)
    with pytest.raises(CorruptData, match=r"statistics-000005\.safetensors: [\d,]+ bytes, ledger says"):
        Store.open(synthetic.path)
    (synthetic.path / STATISTICS).unlink()
    with pytest.raises(CorruptData, match=r"statistics-000005\.safetensors: missing"):
        Store.open(synthetic.path)


def test_open_catches_a_flipped_bit_in_the_statistics(synthetic):
    """They are small, and every row of a training is shifted by them."""
    flip(synthetic.path / STATISTICS, 3000)
    with pytest.raises(CorruptData, match=r"statistics-000005\.safetensors: crc32c .*; repair it with"):
        Store.open(synthetic.path)


def test_statistics_that_no_record_names_are_not_read(synthetic):
    edit(synthetic.path / layout.STORE, lambda data: data["files"].pop(STATISTICS))
    with pytest.raises(CorruptData, match=r"store\.json: it names no statistics-000005"):
        Store.open(synthetic.path)


@pytest.mark.parametrize("name", [layout.REQUEST, layout.PLAN])
@pytest.mark.parametrize("change", ["missing", "another"])
def test_open_compares_the_other_records(synthetic, name, change):
    if change == "missing":
        (synthetic.path / name).unlink()
    else:
        edit(synthetic.path / name, lambda data: data.update({"seed": 9} if "seed" in data else {"segments": [2]}))
    with pytest.raises(CorruptData, match=rf"{name}: missing or of another store; repair it with"):
        Store.open(synthetic.path)


def test_a_plan_that_goes_further_is_an_extension_begun(synthetic):
    def longer(data):
        data["segments"].append(2)
        data["packing"].append(data["packing"][0])
        for stratum in data["strata"]:
            stratum["segments"].append(stratum["segments"][0])

    edit(synthetic.path / layout.PLAN, longer)
    assert Store.open(synthetic.path).record.blocks == 5


def test_verify_tells_of_a_block_that_was_made_from_other_tokens(synthetic):
    edit(synthetic.path / layout.record_path(2), lambda data: data["tokens"].popitem())
    assert faults(synthetic.path) == {
        layout.record_path(2): "the block is of another plan: of other tokens, or other numbers of rows"
    }


def test_a_store_that_was_removed_is_not_begun_again_by_its_readers(synthetic):
    store = Store.open(synthetic.path)
    shutil.rmtree(synthetic.path)
    with pytest.raises(UserError, match=r"store store is gone: .*request\.json cannot be opened"), store.reading():
        pass
    assert not synthetic.path.exists()


def test_the_tokenizers_files_are_recorded(tmp_path):
    made = make_store(tmp_path / "s", tokenizer=True)
    store = Store.open(made.path)
    assert (store.tokenizer / "tokenizer.json").is_file()
    flip(store.tokenizer / "tokenizer.json", 10)
    assert list(faults(made.path)) == ["tokenizer/tokenizer.json"]
    (store.tokenizer / "tokenizer.json").unlink()
    with pytest.raises(CorruptData, match=r"tokenizer\.json is missing"):
        Store.open(made.path)


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("d_in"),
        lambda data: data.update(d_in=0),
        lambda data: data.update(blocks=-1),
        lambda data: data.update(unknown=1),
        lambda data: data["request"].update(edges=[1, 4]),
        lambda data: data["request"].update(keep={"3": 0.5}),
        lambda data: data["request"].update(storage="int4"),
        lambda data: data["files"][STATISTICS].update(crc32c="nonsense"),
        lambda data: data["files"][STATISTICS].update(bytes=-1),
        lambda data: data.clear(),
    ],
)
def test_open_catches_an_edited_store_record(synthetic, change):
    edit(synthetic.path / layout.STORE, change)
    with pytest.raises(CorruptData, match=r"store\.json: "):
        Store.open(synthetic.path)


@pytest.mark.fault(21)
@pytest.mark.parametrize("change", [{"d_in": 17}, {"d_in": 15}, {"d_out": 16}, {"blocks": 6}])
def test_open_catches_a_record_that_claims_another_shape(synthetic, change):
    edit(synthetic.path / layout.STORE, lambda data: data.update(change))
    with pytest.raises(CorruptData):
        Store.open(synthetic.path)


@pytest.mark.fault(21)
@pytest.mark.parametrize("content", ["", "{", '{"format_version": NaN}', "[]", "null"])
def test_open_catches_a_store_record_that_is_no_record(synthetic, content):
    (synthetic.path / layout.STORE).write_text(content)
    with pytest.raises(CorruptData, match=r"store\.json: "):
        Store.open(synthetic.path)


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "tokenizer/../../outside"])
def test_records_cannot_reach_outside_the_store(synthetic, name):
    outside = synthetic.path.parent / "outside"
    outside.write_bytes(b"secret")
    record = {"bytes": 6, "crc32c": file_crc32c(outside)}
    for path in (layout.STORE, layout.record_path(0)):
        whole = (synthetic.path / path).read_text()
        edit(synthetic.path / path, lambda data: data["files"].update({name: record}))
        try:
            found = str([why for _, why in Store.open(synthetic.path).verify() if why])
        except CorruptData as error:
            found = str(error)
        assert "is not the path of a file below the store" in found
        (synthetic.path / path).write_text(whole)


# What is no finished store


@pytest.mark.fault(23)
def test_a_newer_format_asks_for_an_upgrade(synthetic):
    edit(synthetic.path / layout.STORE, lambda data: data.update(format_version=4, something_new=[1]))
    with pytest.raises(UserError, match=r"written by format 4, this reads 3; upgrade"):
        Store.open(synthetic.path)


def test_an_older_format_is_to_be_harvested_again(synthetic):
    edit(synthetic.path / layout.STORE, lambda data: data.update(format_version=1))
    with pytest.raises(UserError, match=r"written by format 1, this reads 3; harvest it again"):
        Store.open(synthetic.path)


@pytest.mark.fault(20)
@pytest.mark.parametrize("group", ["", "strata", "strata/004-016"])
def test_a_group_that_is_missing_or_changed_is_found(synthetic, group):
    path = synthetic.path / layout.ARRAYS / group / "zarr.json"
    edit(path, lambda data: data.update(attributes={"a": 1}))
    with pytest.raises(CorruptData, match="missing or changed"):
        Store.open(synthetic.path)
    path.unlink()
    with pytest.raises(CorruptData, match="missing or changed"):
        Store.open(synthetic.path)


@pytest.mark.fault(30)
@pytest.mark.parametrize("done", [0, 3, 5])
def test_an_unfinished_store_says_how_far_it_has_come(synthetic, done):
    (synthetic.path / layout.STORE).unlink()
    for block in range(done, 5):
        (synthetic.path / layout.record_path(block)).unlink()
    assert progress(synthetic.path) == f"{done} of 5 blocks"
    with pytest.raises(UserError, match=rf"is unfinished \({done} of 5 blocks\); run the same harvest again"):
        Store.open(synthetic.path)


@pytest.mark.fault(30)
def test_a_store_that_is_still_packed_says_so(tmp_path):
    durable.publish_json(tmp_path / layout.REQUEST, {})
    with pytest.raises(UserError, match=r"is unfinished \(packing\)"):
        Store.open(tmp_path)


def test_no_store_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no store at .*none: no such folder; harvest one first"):
        Store.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not a store: it has no store\.json"):
        Store.open(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="no store at"):
        Store.open(tmp_path / "file")
