"""What the files of another library's transcoder say of it: its model, its hooks, and whether it is an autoencoder.

Hooks are named as transformer-lens does, `blocks.N.NAME`. A name that is not of that form is kept as it is.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.errors import CorruptData
from shared.files import durable
from shared.files.untrusted import read_file
from train.interchange import circuit_tracer, saelens, sparsify

_DICTIONARY_LEARNING = "config.json"
_MODULES = {"mlp": "mlp.hook_in", "post_attention_layernorm": "ln2.hook_in", "pre_feedforward_layernorm": "ln2.hook_in"}
"""The hook that a module's input is, by the module's name in its layer."""
_SUBMODULE = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)_layer_(\d{1,4})")
"""The form in which dictionary_learning's own scripts name a submodule; other names are free text."""
_LINE = re.compile(r"(\w+): *(.*)")
_MOST_TEXT = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What the files say; none: they do not."""

    files: tuple[Path, ...]
    """That were read."""
    model: str | None = None
    source_hook: str | None = None
    target_hook: str | None = None
    is_autoencoder: bool | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """The configuration file."""

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of every file by name."""
        return {path.name: _sha256(path) for path in self.files}


def declared(path: Path, library: str) -> Declared:
    """Read what the files at `path` say; `library` as of `read_transcoder`. Raises `CorruptData`."""
    if library == "SAELens":
        return _saelens(path)
    if library == "sparsify":
        return _sparsify(path)
    if library == "circuit-tracer":
        return _circuit_tracer(path)
    if library == "dictionary_learning":
        return _dictionary_learning(path)
    return Declared(files=(path,))  # both Gemma Scopes: the file's place alone says what it is


def _saelens(folder: Path) -> Declared:
    config = _mapping(durable.read_json(folder / saelens.CONFIG), folder / saelens.CONFIG)
    told = config.get("metadata") if isinstance(config.get("metadata"), dict) else config
    assert isinstance(told, dict)
    is_autoencoder = "transcoder" not in str(config.get("architecture"))
    hook = _text(told, "hook_name")
    return Declared(
        files=(folder / saelens.WEIGHTS, folder / saelens.CONFIG),
        model=_text(told, "model_name"),
        source_hook=hook,
        target_hook=hook if is_autoencoder else _text(told, "hook_name_out"),
        is_autoencoder=is_autoencoder,
        metadata=config,
    )


def _sparsify(folder: Path) -> Declared:
    """Read a folder, which has the name of the module whose input is read: `layers.8.mlp`."""
    config = _mapping(durable.read_json(folder / sparsify.CONFIG), folder / sparsify.CONFIG)
    found = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?", folder.resolve().name)
    hook = None
    if found and found[2] in _MODULES:
        hook = f"blocks.{found[1]}.{_MODULES[found[2]]}"
    elif found:
        hook = found[0]
    transcode = config.get("transcode") is True
    return Declared(
        files=(folder / sparsify.WEIGHTS, folder / sparsify.CONFIG),
        source_hook=hook if transcode else None,  # an autoencoder reads a module's output
        is_autoencoder=not transcode,
        metadata=config,
    )


def _circuit_tracer(path: Path) -> Declared:
    """The layer stands in the file's name, the rest in `config.yaml` beside it."""
    beside, layer = path.parent / circuit_tracer.CONFIG, re.fullmatch(r"layer_(\d+)", path.stem)
    if not beside.is_file():
        return Declared(files=(path,), is_autoencoder=False)
    try:
        lines = read_file(beside).decode().splitlines()
    except UnicodeDecodeError as error:
        raise CorruptData(f"{beside}: not text ({error})") from error
    config = {found[1]: found[2].strip().strip("'\"") for line in lines if (found := _LINE.fullmatch(line))}
    hooks = [_text(config, f"feature_{side}_hook") for side in ("input", "output")]
    source, target = (f"blocks.{layer[1]}.{hook}" if hook and layer else hook for hook in hooks)
    return Declared(
        files=(path, beside),
        model=_text(config, "model_name"),
        source_hook=source,
        target_hook=target,
        is_autoencoder=False,
        metadata=config,
    )


def _dictionary_learning(path: Path) -> Declared:
    """dictionary_learning writes `config.json` beside its weights, which names the model and a submodule."""
    beside, found = path.parent / _DICTIONARY_LEARNING, Declared(files=(path,), is_autoencoder=True)
    if not beside.is_file():
        return found
    config = _mapping(durable.read_json(beside), beside)
    told = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
    assert isinstance(told, dict)
    named = _SUBMODULE.fullmatch(_text(told, "submodule_name") or "")
    hook = f"blocks.{named[2]}.hook_{named[1]}" if named else None
    return replace(
        found,
        files=(path, beside),
        model=_text(told, "lm_name"),
        source_hook=hook,
        target_hook=hook,
        metadata=config,
    )


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CorruptData(f"{path}: holds no object")
    return data


def _text(told: Mapping[str, Any], name: str) -> str | None:
    value = told.get(name)
    return value[:_MOST_TEXT] if isinstance(value, str) and value else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
