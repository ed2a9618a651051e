"""Records, settings and tensors from a stranger: bounded, refused in one line, and never a program."""

import ast
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from shared.errors import CorruptData, ProjectError
from shared.files.durable import json_bytes, read_json
from shared.files.untrusted import MOST_NESTED
from shared.store.checks import buffers_record, read_vectors
from shared.store.layout import PLAN, REQUEST, STORE, record_path
from shared.store.store import Store
from shared.store.unembedding import Unembedding
from tests import llms
from tests.llms import command as harvest
from tests.runs import Outcome
from tests.stores import SyntheticStore, edit

ROOT = Path(__file__).parents[2]
Command = Callable[..., Outcome]
STATISTICS = "statistics-000005.safetensors"


# JSON


@pytest.mark.fault(21)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"[" * (MOST_NESTED + 1) + b"]" * (MOST_NESTED + 1), "nested more than 64 deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 64 deep"),
        (b"[" * 10**6, "recursion"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\uDC00": 1}', "surrogates not allowed"),
        (b'"\xed\xa0\x80"', "can't decode"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"9" * 5000, "limit"),
        (b"{" + b",".join(b'"%d": 0' % i for i in range(200_000)) + b', "7": 1}', "duplicate key '7'"),
        (b" " * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_made_to_hurt_is_one_error(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(CorruptData) as error:
        read_json(tmp_path / "f.json")
    assert cause in str(error.value) and len(str(error.value)) < 500


def test_json_as_deep_as_allowed_and_pairs_of_surrogates_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(b"[" * MOST_NESTED + b'"\\ud83d\\ude00"' + b"]" * MOST_NESTED)
    value = read_json(tmp_path / "f.json")
    for _ in range(MOST_NESTED):
        (value,) = value
    assert value == "\U0001f600"


# Records


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all integers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, int) and not isinstance(inner, bool):
            yield (*path, key)
        yield from numbers(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", [STORE, REQUEST, PLAN, record_path(3)])
def test_no_number_of_a_record_may_be_negative_or_huge(synthetic: SyntheticStore, name: str) -> None:
    """Each integer in its turn: one error, and no room taken for what it claims."""
    whole = read_json(synthetic.path / name)
    places = [p for p in numbers(whole) if "token_files" not in p and (len(p) < 2 or p[0] not in ("files", "tokens"))]
    assert len(places) >= {STORE: 60, REQUEST: 10, PLAN: 25, record_path(3): 4}[name]
    for place in places:
        for new in (10**30,) if place[-1] == "seed" else (-1, 2**40):  # other seeds are other requests
            value = json.loads(json.dumps(whole))
            put(value, place, new)
            (synthetic.path / name).write_bytes(json_bytes(value))
            tracemalloc.start()
            try:
                faults = [wrong for _, wrong in Store.open(synthetic.path).verify() if wrong]
            except ProjectError as error:
                faults = [str(error)]
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            informative = any(part in place for part in ("packing", "overall", "outlier_rows", "natural_rows"))
            informative |= len(place) > 1 and place[0] == "strata" and name == STORE
            assert faults or (informative and new == 2**40), (place, new)
            assert all(len(fault) < 1500 and "\n" not in fault for fault in faults)
            assert peak < 30 * 2**20, (place, new, peak)


@pytest.mark.fault(21)
def test_a_record_that_claims_a_million_blocks_takes_no_room(synthetic: SyntheticStore) -> None:
    for name in (STORE, PLAN):
        value = read_json(synthetic.path / name)
        plan = value["plan"] if name == STORE else value
        plan["segments"] = [10**6 - 2]
        value |= {"blocks": 10**6} if name == STORE else {}
        (synthetic.path / name).write_bytes(json_bytes(value))
    tracemalloc.start()
    with pytest.raises(CorruptData):
        Store.open(synthetic.path)
    assert tracemalloc.get_traced_memory()[1] < 500 * 2**20
    tracemalloc.stop()


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda v: v["plan"]["strata"][0].update(rows=300), "rows per block must be"),
        (lambda v: v["plan"]["strata"][0].update(rows=2**30), "more rows of a block than it has tokens"),
        (lambda v: v["plan"]["packing"].clear(), "another number of segments"),
        (lambda v: v["plan"]["strata"][1]["segments"].clear(), "another number of segments"),
        (lambda v: v["plan"]["strata"][1]["segments"][0].update(natural=0), "stand for none"),
        (lambda v: v["plan"]["strata"][1]["segments"][0].update(special=10**6), "more rows are excluded"),
        (lambda v: v["plan"]["token_files"].popitem(), "token_files are not those of its 5 blocks"),
        (lambda v: v["strata"].pop(), "strata are not those that the plan stores rows of"),
        (lambda v: v["overall"]["source"]["norm_quantiles"].pop("0.5"), "norm_quantiles must be of"),
        (lambda v: v["request"].update(edges=list(range(2000))), "at most 1024 items"),
        (lambda v: v["request"].update(label="../up"), "request.label"),
        (lambda v: v["request"].update(source_hook="\x1b[2J"), "request.source_hook"),
        (lambda v: v["request"].update(source_hook="x" * 5000), "at most 4096 characters"),
        (lambda v: v["request"]["model"].update(name="\x1b]0;title\x07"), "request.model.name"),
        (lambda v: v["software"].update({"\x1b[2J": "1"}), "software"),
        (lambda v: v.update({"\x1b[2J" * 1000: 1}), "unknown option"),
        (lambda v: v.update(blocks="x" * 10**6), "blocks"),
        (lambda v: v.update(d_in=[[[[[[0] * 10**4]]]]]), "d_in"),
    ],
)
def test_records_that_contradict_themselves_or_shout(
    synthetic: SyntheticStore, change: Callable[[Any], object], cause: str
) -> None:
    edit(synthetic.path / STORE, change)
    done = harvest("info", synthetic.path)
    assert done.code == 1 and cause in done.err and len(done.err.splitlines()) == 1
    assert "\x1b" not in done.err and len(done.err) < 2000


@pytest.mark.fault(18)
def test_a_record_of_another_block_is_named(synthetic: SyntheticStore) -> None:
    """Its files are whole, and those of the block it stands for would never be looked at."""
    shutil.copyfile(synthetic.path / record_path(3), synthetic.path / record_path(2))
    done = harvest("verify", synthetic.path)
    assert done.code == 1 and done.out.startswith("ledger/000002.json: ") and "is of block 3" in done.out


# Tensors


def publish(store: Path, name: str, data: bytes) -> None:
    """Replace a recorded file, its record included: what no checksum can tell."""
    (store / name).write_bytes(data)
    record = buffers_record([data]).model_dump(mode="json")
    edit(store / STORE, lambda value: value["files"].update({name: record}))


def tensors(pristine: SyntheticStore) -> dict[str, Any]:
    found = Store.open(pristine.path).statistics
    return {f"{a}/{b}/{k}": getattr(s, k) for a, t in found.items() for b, s in t.items() for k in ("mean", "variance")}


HEADER = b'{"a":{"dtype":"F64","shape":[%d],"data_offsets":[0,%d]}}'
CLAIMS = {
    "a header of 2^40 bytes": (2**40).to_bytes(8, "little") + b"{}",
    "a header past the end": (1000).to_bytes(8, "little") + b"{}",
    "a tensor past the end": (lambda h: len(h).to_bytes(8, "little") + h)(HEADER % (2**50, 2**53)),
    "a tensor of more than its bytes": (lambda h: len(h).to_bytes(8, "little") + h + bytes(8))(HEADER % (2**40, 8)),
    "a type that numpy lacks": save({"a": np.zeros(4, np.uint16)}).replace(b'"U16"', b'"BF16"'),
    "nothing": b"",
}


@pytest.mark.fault(21, 26)
@pytest.mark.parametrize("kind", CLAIMS)
def test_a_safetensors_file_that_claims_more_than_it_holds(
    synthetic: SyntheticStore, command: Command, tmp_path: Path, kind: str
) -> None:
    publish(synthetic.path, STATISTICS, CLAIMS[kind])
    done = command("run", "--store", synthetic.path, "--runs", tmp_path / "runs", "--steps", 1)
    assert done.code == 1 and len(done.err.splitlines()) == 1 and STATISTICS in done.err
    (tmp_path / "u").write_bytes(CLAIMS[kind])
    with pytest.raises(CorruptData, match="not a readable unembedding"):
        Unembedding(tmp_path / "u")


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.pop("overall/source/mean"), "'overall/source/mean' is missing"),
        (lambda t: t.update(x=np.zeros(1)), "'x' is not expected"),
        (lambda t: t.update({"overall/source/mean": np.zeros(17)}), r"'overall/source/mean' is float64 [17], expected"),
        (lambda t: t.update({"overall/source/mean": np.zeros((16, 1))}), "float64 [16, 1], expected float64 [16]"),
        (lambda t: t.update({"overall/source/mean": np.zeros(16, np.float32)}), "is float32 [16], expected float64"),
        (lambda t: t.update({"004-016/target/mean": np.full(24, np.nan)}), "'004-016/target/mean' holds NaN"),
        (lambda t: t.update({"004-016/target/variance": np.full(24, -1.0)}), "or a negative variance"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_by_name(
    synthetic: SyntheticStore,
    command: Command,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    cause: str,
) -> None:
    found = tensors(synthetic)
    change(found)
    publish(synthetic.path, STATISTICS, save(found))
    done = command("run", "--store", synthetic.path, "--runs", tmp_path / "runs", "--steps", 1)
    assert done.code == 1 and cause in done.err and STATISTICS in done.err and not (tmp_path / "runs").exists()


def test_sound_statistics_are_read(synthetic: SyntheticStore) -> None:
    found = tensors(synthetic)
    (synthetic.path / "x").write_bytes(save(found))
    read = read_vectors(synthetic.path / "x", {name: len(values) for name, values in found.items()})
    assert read.keys() == found.keys() and all((read[name] == found[name]).all() for name in found)


@pytest.mark.fault(21)
@pytest.mark.parametrize("shape", [[-1, 4], [2**70, 1], [0, 4], [5], [5, 4, 1], "ab", None, [5.0, 4]])
def test_an_unembedding_of_an_impossible_shape(tmp_path: Path, shape: Any) -> None:
    header = {
        "W_U": {"dtype": "F32", "shape": shape, "data_offsets": [0, 80]},
        "final_norm.gain": {"dtype": "F32", "shape": [4], "data_offsets": [80, 96]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "u").write_bytes(len(text).to_bytes(8, "little") + text + bytes(96))
    with pytest.raises(CorruptData, match="not a readable unembedding"):
        Unembedding(tmp_path / "u")


@pytest.mark.fault(21)
def test_an_unembedding_whose_header_is_huge_is_not_parsed(tmp_path: Path) -> None:
    parts = {"W_U": np.ones((5, 4), np.float32), "final_norm.gain": np.ones(4, np.float32)}
    data = save(parts)
    length = int.from_bytes(data[:8], "little")
    (tmp_path / "u").write_bytes(data)
    assert Unembedding(tmp_path / "u").effects(np.ones((1, 4), np.float32), 2).promoted.shape == (1, 2)
    wide = (length + 2**20).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 2**20 + data[8 + length :]
    (tmp_path / "u").write_bytes(wide)
    with pytest.raises(CorruptData, match="its header claims 1,048,"):
        Unembedding(tmp_path / "u")


# Settings


@pytest.mark.fault(21)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("#" * 2**17, "more than 65,536 bytes"),
        ("a = " + "[" * 3000, "nested more than 64 deep"),
        ("a = " + "[" * 70 + "]" * 70, "nested more than 64 deep"),
        ("a." * 100 + "b = 1", "nested more than 64 deep"),
        ("a." * 30_000 + "b = 1", "a line with more than 1000 dots"),
        ("seed = " + "9" * 5000, "limit"),
        ("tokens = 1\nseed = 0x" + "f" * 5000, "must be below 9,223,372,036,854,775,808"),
        ("tokens = 1\nseed = 1000000000000000000000000000000", "must be below 9,223,372,036,854,775,808"),
        (None, "is not a regular file"),
    ],
    ids=range(9),
)
def test_a_preset_made_to_hurt_is_one_line(
    pristine: SyntheticStore, command: Command, tmp_path: Path, content: str | None, cause: str
) -> None:
    path = tmp_path / "mine.toml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    lines: list[Outcome | llms.Outcome] = [harvest("run", "--config", path, "--cache", tmp_path / "cache")]
    if "below" not in cause:
        lines.append(
            command("run", "--config", path, "--store", pristine.path, "--runs", tmp_path / "runs", "--steps", 1)
        )
    for done in lines:
        assert done.code == 2 and "mine" in done.err and cause in done.err
        assert len(done.err.splitlines()) == 1 and len(done.err) < 1500
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


@pytest.mark.fault(21)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["a=" + "[" * 3000, "a." * 100 + "b=1", "a={" + "a." * 2000 + "a=1}", "seed=" + "9" * 5000, "seed=1e999"]
)
def test_an_assignment_made_to_hurt_is_one_line(tmp_path: Path, text: str) -> None:
    done = harvest("run", "--cache", tmp_path / "cache", "--set", text)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and len(done.err) < 500
    assert not (tmp_path / "cache").exists()


# Programs

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.hub.load", "torch.jit.load", "numpy.fromregex", "yaml.load"}


def programs(path: Path) -> Iterator[str]:
    """Places where a file could unpickle, evaluate or trust what it reads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            yield from (f"{where} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"{where} calls {name}"
            for keyword in node.keywords:
                told = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not told:
                    yield f"{where} passes {keyword.arg}"


@pytest.mark.fault(26, 27)
def test_no_module_unpickles_evaluates_or_trusts() -> None:
    files = [path for package in ("harvest", "train", "shared") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 90
    assert [found for path in files for found in programs(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import load", "torch.load(path)", "eval(text)", "exec(text)", "import yaml"),
        *("np.load(path, allow_pickle=True)", "f(trust_remote_code=True)", "f(trust_remote_code=given)"),
    ],
)
def test_what_the_search_for_programs_finds(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.py").write_text(line)
    assert len(list(programs(tmp_path / "x.py"))) >= 1
    (tmp_path / "x.py").write_text("f(trust_remote_code=False); json.load(file); np.load(path)")
    assert list(programs(tmp_path / "x.py")) == []
