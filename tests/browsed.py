"""A small run with the files of its browser of latents, whose corpus holds all that could break a page."""

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models

from shared.store.store import Store
from tests.reported import Reported, reported
from train.report import browser
from train.report.browser import browser_files

CHUNK = 16
HOSTILE = {
    5: "</script><script>alert(1)</script>",
    6: "<img src=x onerror=alert(2)>",
    7: "</textarea><!--<svg onload=alert(3)>",
    8: "\u202eمرحبا",
    9: "👩‍👩‍👧",
    10: "long" * 2500,
    11: "\n",
    12: "&amp;\"'`${alert(4)}",
    13: "\u0000\ufffd",
    14: " the",
    15: "2024",
}


class Browsed(NamedTuple):
    run: Reported
    table: pa.Table
    """With tokens that are promoted and suppressed, and labels, of which the store and the run know nothing."""
    tokenizer: Path
    """Its folder"""
    files: dict[str, bytes]
    page: Path
    """The list of latents; all files lie beside it"""


def browse(folder: Path) -> Browsed:
    """Make such a run in `folder`."""
    run = reported(folder, keep={0: 0.25, 16: 0.5}, bos_norm=2.0)
    table, tokenizer = _table(run), _tokenizer(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "CHUNK", CHUNK)
        files = browser_files("<b>a run</b>", store_with(run, tokenizer), table, run.contexts)
    place = folder / "a run's #1 report"
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return Browsed(run, table, tokenizer, files, place / "latents.html")


def _table(run: Reported) -> pa.Table:
    table, F = run.table(), run.model.d_sae
    known: dict[str, list] = {"promoted": [60, 14], "suppressed": [5, 10], "labels": ["<i>keyword def", "name"]}
    known |= {f"{name}_effects": [0.5, 0.25] for name in ("promoted", "suppressed")}
    known |= {"logit_histogram": [1, 59]}
    known |= {name: [0.75, 0.125] for name in table.column_names if name.startswith("label_")}
    for column, values in known.items():
        at = table.schema.get_field_index(column)
        field = table.schema.field(column)
        table = table.set_column(at, field, pa.array([values] * F, field.type))
    return table


def _tokenizer(folder: Path) -> Path:
    folder.mkdir()
    words = {HOSTILE.get(i, f"word{i}"): i for i in range(61)}
    made = Tokenizer(models.WordLevel(words, unk_token="word0"))
    made.decoder = decoders.Fuse()  # no spaces between tokens
    made.save(str(folder / "tokenizer.json"))
    return folder


def store_with(run: Reported, tokenizer: Path) -> Store:
    """As much of a store as the browser's files are made from."""
    store = run.store
    return cast(
        Store,
        SimpleNamespace(tokenizer=tokenizer, request=store.request, tokens=store.tokens, documents=store.documents),
    )


def handed(script: bytes) -> tuple[str, int | None, dict]:
    """What a script calls, and with what."""
    found = re.fullmatch(rb'transcoderCache\.(\w+)\((?:(\d+),)?"([A-Za-z0-9+/=]*)"\)\n', script)
    assert found
    data = json.loads(gzip.decompress(base64.b64decode(found[3])))
    return found[1].decode(), None if found[2] is None else int(found[2]), data
