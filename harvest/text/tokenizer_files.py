"""The tokenizer in a model's folder: whether there is one, loaded, and as one file."""

from pathlib import Path
from typing import Any

from shared.errors import UserError, cause

TOKENIZER_JSON = "tokenizer.json"
_NEEDED = (TOKENIZER_JSON, "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Tell whether there are a tokenizer's files in a folder."""
    return any((folder / name).is_file() for name in _NEEDED)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a model's folder. Raises `UserError`."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises whatever a file's content led to
        raise UserError(f"{folder}: its tokenizer does not load: {cause(error)}") from error


def as_tokenizer_json(folder: Path) -> bytes | None:
    """Return what `tokenizer.json` would hold of a tokenizer in other files, none if it has no such form."""
    backend = getattr(load_tokenizer(folder), "backend_tokenizer", None)
    return None if backend is None else backend.to_str(pretty=True).encode()
