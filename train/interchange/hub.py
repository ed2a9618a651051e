"""Uploads an export to the Hugging Face hub; every failure is one line, and what was exported stays.

The token is found as `hf` finds it: HF_TOKEN, or what `hf auth login` kept. A repository that is not there is made, and
as with `hf upload` it is public unless told otherwise.
"""

import re
from pathlib import Path
from typing import Any

from shared.console.terminal import Verbosity, verbosity
from shared.errors import ProjectError, UserError, cause

_REFUSED = {
    401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; take one with write access",
    404: "no such owner, or no access to it; check OWNER/NAME, and whose token it is",
    409: "the repository is of another kind or changed meanwhile; try again, or take another name",
    413: "too large for the hub's limits on this account",
}


def require_push(name: str) -> None:
    """Check what a push of an export needs before it is made: a name OWNER/NAME, and a token. Raises `UserError`."""
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise UserError("--push needs huggingface_hub; install it with: pip install huggingface_hub") from error
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise UserError(f"--push {name!r}: expected OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if not get_token():
        raise UserError("--push needs a token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload `folder` as the model `name`, OWNER/NAME, made if it is not there; returns its address.

    `private`: only of one that is made. Raises `ProjectError` when the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if verbosity() == Verbosity.QUIET:
        disable_progress_bars()
    api = HfApi()
    try:
        # None: as the owner's account is set, which is public but in some organisations
        url = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # of the library, the network and the token's file: of many kinds
        raise ProjectError(f"--push {name}: {_explain(error)}. {folder} is whole; {_again(folder, name)}") from error
    return str(url)


def _again(folder: Path, name: str) -> str:
    return f"then upload it with: hf upload {name} {folder}"


def _explain(error: Exception) -> str:
    while getattr(error, "response", None) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what failed to upload a file is wrapped
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in _REFUSED:
        return f"the hub answered {status}: {_REFUSED[status]}"
    if status is not None:
        return f"the hub answered {status} ({cause(error)})"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it"
    return f"the hub is out of reach ({type(error).__name__}: {cause(error)}); check the network"
