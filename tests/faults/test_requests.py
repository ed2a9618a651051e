"""A store whose request was changed is refused by the field; a reader of one that is being written is told so."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from shared.files.durable import publish_json, read_json
from shared.store.layout import REQUEST, STORE, CorpusIdentity, ModelIdentity, StoreRequest
from tests.llms import BLOCK_TOKENS, Line, command, contents, refused, start, wait_for
from tests.runs import Outcome

FIELDS = [
    *(name for name in StoreRequest.model_fields if name not in ("model", "corpus")),
    *(f"model.{name}" for name in ModelIdentity.model_fields),
    *(f"corpus.{name}" for name in CorpusIdentity.model_fields),
]
OTHER: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "model.attention": "sdpa",
    "model.device": "cuda",
    "model.revision": "main",
    "corpus.kind": "messages",
    "corpus.order": "as_read",
    "documents": "apart",
    "edges": [0, 1, 4],
    "keep": {"0": 0.5},
    "cap": {"0": 5},
    "storage": "float16",
    "max_norm_quantile": 0.5,
    "imported": {
        "format": "npy",
        "files": [{"name": "source.npy", "bytes": 8, "sha256": "00" * 32}],
        "source": "source",
        "target": "target",
        "tokens": None,
        "positions": True,
    },
}


def another(name: str, old: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + 1
    return "00" * 32 if old and re.fullmatch("[0-9a-f]{64}", old) else f"{old}x"


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_request_is_refused_by_its_field(small: Line, finished: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    value = read_json(copy / REQUEST)
    *parents, last = name.split(".")
    table = value
    for key in parents:
        table = table[key]
    old, table[last] = table.get(last), another(name, table.get(last))  # `imported` is not there in a harvest's
    assert old != table[last]
    publish_json(copy / REQUEST, value)
    for state in ("finished", "unfinished"):
        if state == "unfinished":
            (copy / STORE).unlink()
        before = contents(copy)
        done = command(*small(tmp_path))
        if name == "format_version":
            refused(done, "request.json: written by format 4, this reads 3; upgrade")
        else:
            shown = {"keep": "keep.0", "cap": "cap.0", "imported": "imported.format"}.get(name, name)
            refused(done, f"belongs to another request: {shown} is ", "choose another --cache")
        assert contents(copy) == before


@pytest.mark.slow
@pytest.mark.fault(30)
def test_a_reader_during_the_write_is_told_how_far_it_is(small: Line, tmp_path: Path, command: Any) -> None:
    cache = tmp_path / "cache"
    process = start(*small(cache, tokens=14 * BLOCK_TOKENS))
    try:
        wait_for(cache, "*/ledger/000002.json", process)
        process.send_signal(signal.SIGSTOP)
        (store,) = [path for path in cache.iterdir() if path.is_dir()]
        count = len(list(store.glob("ledger/[0-9]*[0-9].json")))
        assert 3 <= count < 16
        done: Outcome = command("run", "--store", store, "--runs", tmp_path / "runs", "--steps", 1)
        assert done.code == 2 and len(done.err.splitlines()) == 1
        assert f"{store} is unfinished ({count} of 16 blocks); run the same harvest again to finish it" in done.err
        assert not (tmp_path / "runs").exists()
    finally:
        process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
