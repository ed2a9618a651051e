"""What a model's folder says about itself, read from its files alone: no torch, no transformers."""

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from harvest.digests import file_sha256, remember_folder, require_content
from harvest.embedded import MODEL_FOLDER
from harvest.hub import model_snapshot
from harvest.settings import EMBEDDED, ModelSettings, WindowSettings
from harvest.text.tokenizer_files import has_tokenizer, load_tokenizer
from shared.config import brief
from shared.errors import UserError
from shared.files.untrusted import regular_or_link

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_MOST_HEADER_BYTES = 100 * 2**20
_MOST_SIZE, _MOST_LAYERS = 2**31, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's folder and where it came from."""

    folder: Path
    name: str
    """A hub name, `embedded`, or the base name of a local folder: no absolute path gets into a store."""
    revision: str | None
    """The hub's commit."""

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, in order of name; none when it has no tokenizer."""
        if not has_tokenizer(self.folder):
            return []
        return [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).is_file()]

    def require_tokenizer(self) -> None:
        """Raise `UserError` when there is no tokenizer: all texts but token ids need one, and so do special tokens."""
        if not has_tokenizer(self.folder):
            raise UserError(f"{self.folder} has no tokenizer (tokenizer.json); copy the model's tokenizer files there")

    def weights_digest(self) -> str:
        """Return the SHA-256 over the names and contents of the configuration and the weights. Raises `UserError`.

        Where a local folder lies is remembered by it, so that a store's model is found again (`known_folder`).
        """
        weights = sorted(self.folder.glob("*.safetensors"))
        if not weights:
            raise UserError(f"{self.folder} has no weights in safetensors form; pickled weights are never loaded")
        digest = _digest([self.folder / "config.json", *weights])
        if self.revision is None and self.name != EMBEDDED:
            remember_folder(digest, self.folder)
        return digest

    def tokenizer_digest(self) -> str:
        """Return the SHA-256 over the names and contents of the tokenizer's files."""
        return _digest(self.tokenizer_files)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the configuration says about sizes."""

    layers: int
    d_model: int
    vocabulary: int
    max_context: int | None
    """Positions the model was made for, none if it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The tokens that windows are made with."""

    bos: str | None
    eos: str | None


def find_model(settings: ModelSettings) -> ModelFiles:
    """Locate the model: the embedded one, a local folder, or the hub. Raises `UserError`."""
    folder = Path(settings.name).expanduser()
    if settings.revision is not None and (settings.name == EMBEDDED or folder.is_dir()):
        raise UserError(f"model.revision = {settings.revision} has no meaning for a local model; leave it out")
    if settings.name == EMBEDDED:
        return _local(MODEL_FOLDER, EMBEDDED)
    if folder.is_dir():
        return _local(folder, folder.resolve().name)
    if re.match(r"[./~]", settings.name) or settings.name.count("/") > 1:
        raise UserError(f"no model folder at {settings.name}; pass a Hugging Face model folder or a name on the hub")
    snapshot, commit = model_snapshot(settings.name, settings.revision)
    return ModelFiles(folder=snapshot, name=settings.name, revision=commit)


def _local(folder: Path, name: str) -> ModelFiles:
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), which is not applied here; merge it into its model, for "
            "example with peft's merge_and_unload, and pass what that saves"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return ModelFiles(folder=folder, name=name, revision=None)


def read_shape(folder: Path) -> ModelShape:
    """Read the sizes in `config.json`. Raises `UserError` when it names none, or not how weights are quantised."""
    config = _read_json(folder / "config.json")
    _require_plain_index(folder)
    for path in (folder / name for name in _TOKENIZER_FILES):
        if os.path.lexists(path) and not path.is_file():  # it would pass for one that is not there
            raise UserError(f"{path} is not a readable file; download it again")
    if not config.get("quantization_config"):
        _require_numbers(folder)
    config = config.get("text_config", config)
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: text_config is {brief(config)}, expected an object")

    def first(*names: str) -> int | None:
        name = next((name for name in names if config.get(name) is not None), "")
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= _MOST_SIZE):
            raise UserError(
                f"{folder / 'config.json'}: {name} is {brief(value)}, expected a number from 1 to {_MOST_SIZE:,}"
            )
        return value

    layers, d_model = first("num_hidden_layers", "n_layer", "num_layers"), first("hidden_size", "n_embd", "d_model")
    if layers is not None and layers > _MOST_LAYERS:
        raise UserError(f"{folder / 'config.json'}: {layers:,} layers, expected at most {_MOST_LAYERS:,}")
    vocabulary = first("vocab_size") or _embedding_rows(folder)  # Gemma 3's leave it out where it is the class's own
    if layers is None or d_model is None or vocabulary is None:
        raise UserError(f"{folder / 'config.json'} names no number of layers, hidden size or vocabulary size")
    longest = first("max_position_embeddings", "n_positions", "n_ctx")
    return ModelShape(layers=layers, d_model=d_model, vocabulary=vocabulary, max_context=longest)


def _embedding_rows(folder: Path) -> int | None:
    """Return the number of rows of the token embedding, by the headers of the weight files."""
    for path, header in _headers(folder):
        for name, tensor in header.items():
            if name.endswith(_EMBEDDINGS):
                shape = tensor.get("shape") if isinstance(tensor, dict) else None
                if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                    raise UserError(f"{path}: not a safetensors file ({name} has the shape {brief(shape)})")
                return int(shape[0])
    return None


def _require_plain_index(folder: Path) -> None:
    """Raise `UserError` where the list of weight files names others than safetensors in the folder.

    Others are in no digest, and could be pickled.
    """
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{path}: its weight_map is {brief(names)}, expected an object")
    for name in dict.fromkeys(map(str, names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: names {brief(name)}, expected a .safetensors file in the same folder")
        if not (folder / name).exists():
            raise UserError(f"{path}: names {brief(name)}, which is not there; download the model again")


def _require_numbers(folder: Path) -> None:
    """Raise `UserError` on weights that mean nothing without a scale: whole numbers, or floats of 8 bits."""
    for path, header in _headers(folder):
        for name, tensor in header.items():
            kind = tensor.get("dtype") if isinstance(tensor, dict) else None
            if name.endswith(".weight") and isinstance(kind, str) and kind.startswith(("I", "U", "F8", "F4")):
                raise UserError(
                    f"{path}: {name} is of type {kind}, so it is quantised, and config.json does not say how "
                    "(quantization_config); use the unquantised model"
                )


def _headers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield what each weight file says of its tensors. Raises `UserError` when one is no such file."""
    for path in sorted(folder.glob("*.safetensors")):
        require_content(path)
        with open(path, "rb", opener=regular_or_link) as file:
            size = min(int.from_bytes(file.read(8), "little"), _MOST_HEADER_BYTES)
            try:
                header = json.loads(file.read(size))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: not a safetensors file ({error})") from error
        if not isinstance(header, dict):
            raise UserError(f"{path}: not a safetensors file (its header is {brief(header)}, expected an object)")
        yield path, header


def read_special_tokens(files: ModelFiles) -> SpecialTokens:
    """Read BOS and EOS as the tokenizer's files name them; without a tokenizer there are none."""
    if not has_tokenizer(files.folder):
        return SpecialTokens(bos=None, eos=None)
    named: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (files.folder / name).is_file():
            config = _read_json(files.folder / name)
            tokens = {key: config[key] for key in ("bos_token", "eos_token") if key in config}
            named |= {key: _content(files.folder / name, key, token) for key, token in tokens.items()}
    if "bos_token" not in named:
        named = _defaults(files.folder)
    return SpecialTokens(bos=named["bos_token"] or None, eos=named.get("eos_token") or None)


def window_tokens(settings: WindowSettings, folder: Path, special: SpecialTokens) -> tuple[bool, str | None]:
    """Tell whether BOS is put first, and the separator between documents, if any. Raises `UserError`."""
    if settings.bos is True and not special.bos:
        raise UserError(f"the tokenizer in {folder} has no BOS token; pass --set windows.bos=auto")
    if settings.separator is True and not special.eos:
        raise UserError(
            f"the tokenizer in {folder} has no EOS to put between documents; pass --set windows.separator=auto"
        )
    return bool(special.bos and settings.bos), special.eos if settings.separator else None


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Choose the kind of device to run on. Asks the driver and torch's version only, so that torch stays unloaded."""
    if wanted != "auto":
        return wanted
    return "cuda" if "+cpu" not in version("torch") and _cuda_devices() else "cpu"


def _cuda_devices() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def _defaults(folder: Path) -> dict[str, str | None]:
    """Return the tokenizer class's own special tokens, for folders that do not name them (gpt2)."""
    tokenizer = load_tokenizer(folder)
    return {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


def _content(path: Path, key: str, token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise UserError(f"{path}: {key} is {brief(token)}, expected text")
    return text


def _digest(paths: Iterable[Path]) -> str:
    lines = [f"{path.name} {_file_sha256(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    # The hub's cache names a large file's blob by its SHA-256: no need to read gigabytes.
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    return file_sha256(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
