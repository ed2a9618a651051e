"""The card of a store on the Hugging Face hub: what it holds, how to open it, and how to check it."""

import hashlib
import json

from shared.files.durable import json_bytes
from shared.store.layout import PACKED, STORE, StoreRecord, StoreRequest
from shared.store.store import Store

_DECODE = {
    "bfloat16": "rows = (found.astype(np.uint32) << 16).view(np.float32)  # stored as the bits of bfloat16",
    "float16": "rows = found.astype(np.float32)",
    "float32": "rows = found",
    "int8": """\
part, block = store["{group}"], np.arange(256) // {rows}  # {rows} rows of a block
scale, (mean, unit) = part["row_scale"][:256, :1], (part["block_units"][k::2, :{d_in}][block] for k in (0, 1))
rows = found * scale * unit + mean  # "target" has column 1 of row_scale, and columns {d_in}: of block_units""",
}


def store_card(store: Store, name: str, licence: str | None = None) -> str:
    """Return README.md of the packed `store` in the data set `name`, with the front matter that the hub reads.

    Without a `licence` there is no field of one, and the card says so.
    """
    assert store.packed is not None
    record, request = store.record, store.request
    lines = [
        _front(request, licence),
        f"# Activations of {request.model.name}, layer {request.layer}",
        "",
        f"Pairs of `{request.source_hook}` and `{request.target_hook}`, a row for each token, to train transcoders on.",
        "",
        *_table(store),
        "",
        "## Opening it",
        "",
        "With stock Zarr (3 or later):",
        "",
        *_stock(record, name),
        "",
        "With the project that made it, which trains from it as it is:",
        "",
        f"    python -m harvest pull {name}",
        f"    python -m train run --store cache/{request.folder}",
        "",
        "## Checksums",
        "",
        f"`{PACKED}` has the size and crc32c of every file of rows and tokens, `{STORE}` those of the statistics and",
        "the tokenizer, and `harvest pull` and `harvest verify` compare them. SHA-256 of these two:",
        "",
        f"- `{STORE}`: {_sha256(json_bytes(record.model_dump(mode='json')))}",
        f"- `{PACKED}`: {_sha256(json_bytes(store.packed.model_dump(mode='json')))}",
        "",
        "## Licence",
        "",
        _licence(request, licence),
        "",
    ]
    return "\n".join(lines)


def _front(request: StoreRequest, licence: str | None) -> str:
    """Return the front matter. Names are quoted as JSON, which YAML reads."""
    lines = ["---", *([f"license: {licence}"] if licence else []), "viewer: false", "tags:"]
    lines += ["- activations", "- transcoder", "- mechanistic-interpretability", "- zarr"]
    if "/" in request.model.name:
        lines += ["base_model:", f"- {json.dumps(request.model.name)}"]
    if request.corpus.revision:
        lines += ["source_datasets:", f"- {json.dumps(request.corpus.name)}"]
    return "\n".join([*lines, "---", ""])


def _table(store: Store) -> list[str]:
    record, request = store.record, store.request
    assert store.packed is not None
    packed = sum(file.bytes for file in store.packed.files.values())
    rows = record.blocks * sum(stratum.rows for stratum in record.plan.stored_strata)
    positions = ", ".join(f"{s.start} to {s.stop - 1}" for s in record.plan.stored_strata)
    bos = ", BOS first" if request.bos else ""
    return [
        "| | |",
        "|---|---|",
        f"| model | {request.model.name}, revision {request.model.revision or 'none'}, in {request.model.dtype} |",
        f"| its weights | SHA-256 {request.model.weights} |",
        f"| hooks | `{request.source_hook}` [{record.d_in}] and `{request.target_hook}` [{record.d_out}] |",
        f"| text | {request.corpus.name}, revision {request.corpus.revision or 'none'} |",
        f"| windows | {request.context_size} tokens{bos}; documents {request.documents} |",
        f"| rows | {rows:,} pairs, those of {request.held_out_blocks} of {record.blocks} blocks held out |",
        f"| positions | {positions}, an array for each range |",
        f"| type | {request.storage} |",
        f"| bytes | {packed:,}, unpacked {store.packed.unpacked_bytes:,} |",
    ]


def _stock(record: StoreRecord, name: str) -> list[str]:
    last = record.plan.stored_strata[-1]
    group = f"strata/{last.name}"
    decode = _DECODE[record.request.storage].format(group=group, rows=last.rows, d_in=record.d_in)
    code = f"""\
import numpy as np
import zarr
from huggingface_hub import snapshot_download

folder = snapshot_download("{name}", repo_type="dataset")
store = zarr.open_group(f"{{folder}}/activations.zarr", mode="r")
found = store["{group}/source"][:256]  # [row, dimension]; "target" has the other hook
{decode}
windows = store["{group}/sequence"][:256]  # the row of store["tokens"] that each is from
tokens = store["tokens"][:][windows, store["{group}/offset"][:256]]"""
    return [f"    {line}".rstrip() for line in code.splitlines()]


def _licence(request: StoreRequest, licence: str | None) -> str:
    given = f"{licence}." if licence else "None is stated here: add one to the front matter of this card."
    return f"{given} The licences of the model and of the text ({request.corpus.name}) may bind its use as well."


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
