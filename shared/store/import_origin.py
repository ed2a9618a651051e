"""What the record of an imported store says of the files that its rows come from. Pure."""

from typing import Literal

from pydantic import Field

from shared.bounds import MAX_IMPORTED, Count, Digest, Name
from shared.config import Config

ImportFormat = Literal["npy", "safetensors", "saelens", "vllm", "clt-forge"]
UNKNOWN = "0" * 64
"""In place of a digest of weights that are not known."""


class ImportedFile(Config):
    """A file that rows were imported from."""

    name: Name
    """Without its folders."""
    bytes: Count
    sha256: Digest


class ImportOrigin(Config):
    """Where the rows of an imported store come from."""

    format: ImportFormat
    files: tuple[ImportedFile, ...] = Field(min_length=1, max_length=MAX_IMPORTED)
    source: Name
    """The array, tensor or column of the sources."""
    target: Name
    tokens: Name | None
    """That of the token ids; none: they are unknown, and all 0 in the store."""
    positions: bool
    """Whether rows come in sequences; without, windows are neighbouring rows, and positions mean nothing."""
