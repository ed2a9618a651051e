"""The embedded model's text: the running Python's standard library, without its tests."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Third-party code, tests and caches differ between machines, or are not the library itself. The encodings are generated
# character tables: an eighth of the library, and so easy to predict that they would flatter every loss.
EXCLUDED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
)
# What the build writes holds the builder's own paths, so it differs between machines of one Python version.
BUILD_PRODUCT_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_ONE_IN = 25


@dataclass(frozen=True)
class Document:
    """One source file: ``name`` is its POSIX path relative to the standard library's folder."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The documents in sorted order of name, and how many files did not decode as UTF-8."""

    documents: list[Document]
    undecodable: int


def is_held_out(name: str) -> bool:
    """Tell whether a document is kept from training, by its name alone, so that it holds for every Python version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % HELD_OUT_ONE_IN == 0


def is_included(name: str) -> bool:
    """Tell whether the file or folder of this relative path belongs to the corpus."""
    parts = name.split("/")
    return EXCLUDED_PARTS.isdisjoint(parts) and not any(part.startswith(BUILD_PRODUCT_PREFIXES) for part in parts)


def included_names(root: Path) -> list[str]:
    """List the sorted POSIX paths, relative to ``root``, of the corpus's files."""
    names = []
    for folder, subfolders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        # Not entering what is excluded: site-packages may hold a hundred times the library's files.
        subfolders[:] = [name for name in subfolders if is_included(name)]
        names += [(relative / name).as_posix() for name in files if name.endswith(".py") and is_included(name)]
    return sorted(names)


def read_corpus(folder: Path | None = None) -> Corpus:
    """Read every file of the corpus below ``folder`` (the running Python's standard library when not given)."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    found, undecodable = [], 0
    for name in included_names(root):
        try:
            # Text mode turns every line ending into "\n", so that a Windows install gives the same corpus.
            found.append(Document(name, (root / name).read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            undecodable += 1
    return Corpus(found, undecodable)


def documents() -> list[Document]:
    """Return all documents of the running Python's standard library, sorted by name."""
    return read_corpus().documents


def corpus_digest(documents: Iterable[Document]) -> str:
    """Hash every name and text with SHA-256, each preceded by its length so that no two corpora share a byte stream."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.name.encode(), document.text.encode()):
            digest.update(len(field).to_bytes(8, "big"))
            digest.update(field)
    return digest.hexdigest()
