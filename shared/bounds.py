"""Types of a record's fields, with bounds: none makes a loop or an allocation huge, or names a file outside."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MAX_CONTEXT = 2**16
"""Positions are stored as uint16."""
MAX_SEQUENCES = 2**20
"""Windows per block, or per forward pass."""
MAX_BLOCKS = 10**6
"""Their numbers have six digits in the names of files."""
MAX_STRATA = 1024
MAX_WIDTH = 2**20
"""Values per row."""
MAX_FILES = 2**26
"""Shard files of a store."""
MAX_IMPORTED = 50_000
"""Files that a store is imported from: their names and digests fit into its request."""
MAX_NAME = 4096
"""Characters: as long as a path can be."""

Count = Annotated[int, Field(ge=0, le=2**53)]
"""Rows, tokens or bytes: what every JSON reader keeps exactly."""
Sequences = Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]
Blocks = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Position = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Layer = Annotated[int, Field(ge=0, le=2**16)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Edges = Annotated[tuple[Position, ...], Field(max_length=MAX_STRATA)]
Text = Annotated[str, Field(max_length=MAX_NAME)]
Name = Annotated[str, Field(max_length=MAX_NAME, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text that is printed: without control characters, so it cannot steer a terminal."""
Positions = Annotated[str, Field(pattern=r"^[0-9]{1,10}-[0-9]{1,10}$")]
"""The name of a stratum, such as `004-016`."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256."""
Label = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
"""The start of a folder's name."""


def _below(name: str) -> str:
    parts = name.split("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9._-]{1,255}", part) for part in parts)
    if not plain or len(name) > 1024 or {".", ".."} & set(parts):
        raise ValueError(f"{name[:80]!r} is not the path of a file below the store")
    return name


FileName = Annotated[str, AfterValidator(_below)]
"""A relative path of plain names with no way up: a record can name nothing outside its store."""
Every = Annotated[int, Field(ge=1, le=10**9)] | Literal["auto"]
"""Steps between what is done now and then; `auto` is resolved when a run starts."""
