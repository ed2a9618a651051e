"""Finds models and data sets on the Hugging Face hub; every failure becomes one line that says what to do."""

import re
from pathlib import Path
from typing import Any

from shared.errors import UserError, cause

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the local folder of a hub model, downloaded if needed, and its commit. Raises `UserError`."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_MODEL_FILES))
    except Exception as error:
        raise UserError(explain("model", name, error)) from error
    return folder, folder.name


def dataset_commit(name: str, revision: str | None) -> str:
    """Find the commit that `revision` of a hub data set means; from the local cache when the hub is out of reach."""
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        folder = "datasets--" + name.replace("/", "--")
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and not _refused(error):
            return revision
        known = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")
        if not _refused(error) and known.is_file():
            return known.read_text().strip()
        raise UserError(explain("data set", name, error)) from error


def explain(what: str, name: str, error: Exception) -> str:
    """Say in one line what was looked for, where, and what to do."""
    where = f"{what} {name!r}: neither a local path nor usable from the Hugging Face hub"
    if _refused(error):
        return (
            f"{where}: access refused; accept its licence at https://huggingface.co/{_page(what)}{name}, then log in "
            f"with `huggingface-cli login` or set HF_TOKEN, or pass a local {_local(what)}"
        )
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"):
        return f"{where}: no such name there; check it, log in if it is private, or pass a local {_local(what)}"
    if kind == "RevisionNotFoundError":
        return f"{where}: no such revision there; check it"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return f"{where}: it is not in the hub's local cache, and {_unreached(error)}, or pass a local {_local(what)}"
    return f"{where} ({kind}: {cause(error)}); check the network, or pass a local {_local(what)}"


def _unreached(error: Exception) -> str:
    """Say why the hub did not answer, and what to do; the library says more lines than the one that tells."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"the hub was not reached ({first.removeprefix('Got: ')[:200]}); check the network"


def _refused(error: Exception) -> bool:
    response: Any = getattr(error, "response", None)
    gated = "gated" in str(error).lower() or type(error).__name__ == "GatedRepoError"
    return gated or getattr(response, "status_code", None) == 403


def _page(what: str) -> str:
    return "" if what == "model" else "datasets/"


def _local(what: str) -> str:
    return "folder" if what == "model" else "file (.jsonl, .parquet, .txt)"
