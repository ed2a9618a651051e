"""Fuzz targets of what people bring to a harvest: model folders and texts."""

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from harvest.embedded import MODEL_FOLDER
from harvest.llm.model import probe
from harvest.llm.model_files import find_model, read_shape, read_special_tokens, window_tokens
from harvest.settings import ModelSettings, TextSettings, WindowSettings
from harvest.text.corpus import open_corpus
from harvest.text.tokenize import Encoder
from shared.errors import ProjectError
from shared.store.layout import CorpusIdentity
from tests.llms import make_llama, texts

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
NAMES = ("text.jsonl", "text.txt", "text.json", "text.csv")
TEXT = CorpusIdentity(
    name="text.txt", digest="0" * 64, column="text", kind="text", order="as_read", separator=None
)  # fmt: skip
MOST_REFUSED = 3


def model_folder(data: bytes) -> None:
    """A model's folder with one file replaced: what a harvest asks before it loads weights, or one error.

    Of weights, the header is replaced, and it alone says how large the vocabulary is.
    """
    name = FILES[(data[:1] or b"\0")[0] % len(FILES)]
    folder = _folder() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_model(), folder)
    weights = name == "model.safetensors"
    (folder / name).write_bytes(struct.pack("<Q", len(data[1:])) + data[1:] if weights else data[1:])
    if weights:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": None}))
    with suppress(ProjectError):
        files = find_model(ModelSettings(name=str(folder)))
        shape, special = read_shape(folder), read_special_tokens(files)
        window_tokens(WindowSettings(), folder, special)
        files.weights_digest(), files.tokenizer_digest()
        if "tokenizer" in name:
            encoder = Encoder(folder, TEXT, shape.vocabulary)
            encoder.require_embedded(encoder.bos, encoder.separator)
        elif name == "config.json":
            probe(folder, ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"], 8)


def text(data: bytes) -> None:
    """A file of text: documents whose token ids the model has, in both orders, or one error."""
    path = _folder() / NAMES[(data[:1] or b"\0")[0] % len(NAMES)]
    path.write_bytes(data[1:])
    vocabulary = read_shape(MODEL_FOLDER).vocabulary
    for streaming in (False, True):
        with suppress(ProjectError):
            settings = TextSettings(name=(str(path),), streaming=streaming, max_refused=MOST_REFUSED)
            corpus = open_corpus(settings, None, 0)
            for encoded in Encoder(MODEL_FOLDER, corpus.identity, vocabulary, MOST_REFUSED).encode(corpus.read()):
                assert encoded.ids.ndim == 1 and ((encoded.ids >= 0) & (encoded.ids < vocabulary)).all()


TARGETS: dict[str, Callable[[bytes], None]] = {target.__name__: target for target in (model_folder, text)}


def seeds() -> Iterator[tuple[str, bytes]]:
    """(target, input) of sound files."""
    for i, name in enumerate(FILES[:3]):
        yield "model_folder", bytes([i]) + _compact((_model() / name).read_bytes())
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [320, 32], "data_offsets": [0, 40960]}}
    yield "model_folder", b"\3" + json.dumps(header).encode()
    rows = [json.dumps({"text": one[:60], "n": i}) for i, one in enumerate(texts(3))]
    yield "text", b"\0" + "\n".join(rows).encode()
    yield "text", b"\0" + b'{"input_ids": [5, 6, 7, 1, 1], "attention_mask": [1, 1, 1, 0, 0]}\n'
    yield "text", b"\1" + "one line\r\nand another, \u00e9\n".encode()
    yield "text", b"\2" + f"[{', '.join(rows)}]".encode()
    yield "text", b"\3" + b'text,n\n"a, b",1\nc,2\n'


def _compact(data: bytes) -> bytes:
    return json.dumps(json.loads(data)).encode()


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="transcoder-cache-fuzz-inputs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _model() -> Path:
    return make_llama(_folder() / "whole")
