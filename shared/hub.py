"""What both stages ask of the Hugging Face hub: a repository's name, a token, and one line for whatever fails.

The token is found as `hf` finds it: HF_TOKEN, or what `hf auth login` kept.
"""

import re
from typing import Any

from shared.errors import UserError, cause

_REFUSED = {
    401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; take one with write access",
    404: "no such owner, or no access to it; check OWNER/NAME, and whose token it is",
    409: "the repository is of another kind or changed meanwhile; try again, or take another name",
    413: "too large for the hub's limits on this account",
}


def require_name(what: str, name: str) -> None:
    """Check that the hub's library is there, and that a repository is named OWNER/NAME. Raises `UserError`.

    `what` is the option or command that asks for it.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} needs huggingface_hub; install it with: pip install huggingface_hub") from error
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise UserError(f"{what} {name!r}: expected OWNER/NAME, of letters, digits, '-', '_' and '.'")


def require_token(what: str) -> None:
    """Check that there is a token of the hub. Raises `UserError`."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(f"{what} needs a token of the Hugging Face hub; log in with `hf auth login`, or set HF_TOKEN")


def check_licence(licence: str | None) -> None:
    """Raise `UserError` unless `licence` can be the hub's name of one, or is not given."""
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(f"--license {licence!r}: expected the hub's name of one, such as mit, apache-2.0 or cc-by-4.0")


def explain(error: Exception) -> str:
    """Say in one line why a request to the hub failed, and what to do."""
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
