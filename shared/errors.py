"""The errors a user can meet, the exit code each one maps to, and warnings.

ProjectError            1   something failed that was not the user's input
├── UserError           2   bad input: says what, where, expected against got, and what to do
├── CorruptData         1   bytes on disk are not what was written
└── Stopped             3   stopped on the way and resumable: run the same command again
    └── DiskFull        3
"""

import errno
import os
import re
import sys
from contextlib import suppress
from typing import IO, TextIO

_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tabs and line ends, what turns the direction of writing, and halves of characters."""

_MOST_CAUSE = 200


class ProjectError(Exception):
    """Base of every error that is reported in one line, without a traceback."""

    exit_code = 1


class UserError(ProjectError):
    """The input cannot be used as given; nothing was written."""

    exit_code = 2


class CorruptData(ProjectError):
    """A file's content contradicts its record."""


class Stopped(ProjectError):
    """Interrupted in good order; running the same command again continues."""

    exit_code = 3


class DiskFull(Stopped):
    """No space (or quota, or file-size limit) left while writing."""


def printable(text: str) -> str:
    """Return `text` with escapes, as Python writes them, in place of what a terminal would obey or cannot show.

    Names and texts of strangers stand in messages; every line that is printed goes through this.
    """
    return _NO_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cause(error: BaseException) -> str:
    """Return what a library's error says, in one line of at most 200 characters and a mark of what was cut."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MOST_CAUSE else f"{text[:_MOST_CAUSE]}..."


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print text on stderr, or on another `stream`; where nobody reads it any more, that stops no work."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        give_up(stream, error)


def give_up(stream: IO[str], error: OSError) -> None:
    """Go on without `stream` after `error`: its terminal or pipe is gone. A result that has no room raises `error`."""
    gone = error.errno in (errno.EPIPE, errno.EIO)
    if not gone and stream is sys.stderr:
        return
    with suppress(OSError):  # or what is still in its buffer would fail again when the process ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    if not gone:
        raise error


def warn(text: str) -> None:
    """Print a warning on stderr, in one line, however little the user wants to hear."""
    tell(f"warning: {printable(' '.join(text.split()))}")
