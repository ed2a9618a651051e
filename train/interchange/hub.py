"""Uploads an export to the Hugging Face hub; every failure is one line, and what was exported stays.

A repository that is not there is made, and as with `hf upload` it is public unless told otherwise.
"""

from pathlib import Path

from shared.console.terminal import Verbosity, verbosity
from shared.errors import ProjectError
from shared.hub import explain, require_name, require_token


def require_push(name: str) -> None:
    """Check what a push of an export needs before it is made: a name OWNER/NAME, and a token. Raises `UserError`."""
    require_name("--push", name)
    require_token("--push")


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
        raise ProjectError(f"--push {name}: {explain(error)}. {folder} is whole; {_again(folder, name)}") from error
    return str(url)


def _again(folder: Path, name: str) -> str:
    return f"then upload it with: hf upload {name} {folder}"
