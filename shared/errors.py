"""The errors a user can meet, the exit code each one maps to, and warnings.

ProjectError            1   something failed that was not the user's input
├── UserError           2   bad input: says what, where, expected against got, and what to do
├── CorruptData         1   bytes on disk are not what was written
└── Stopped             3   stopped on the way and resumable: run the same command again
    └── DiskFull        3
"""

import sys


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


def warn(text: str) -> None:
    """Print a warning on stderr, however little the user wants to hear."""
    print(f"warning: {text}", file=sys.stderr)
