"""Runs a click group and maps every error a user can meet to one line on stderr and an exit code; shared options."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shared.errors import ProjectError, Stopped
from shared.packed import LOCAL_BYTES
from shared.process import let_idle_threads_sleep
from shared.store import Local


def run(group: click.Group) -> None:
    """Run `group` on `sys.argv` and exit: 0 done, 1 failed, 2 the user's input, 3 stopped and resumable."""
    let_idle_threads_sleep()
    try:
        group.main(standalone_mode=False)
    except ProjectError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else group.name
        _fail(f"{error.format_message()}  (see: {command} --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped; run the same command again to continue", Stopped.exit_code)


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def local_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where a packed store is decoded: options that become the argument `local`."""

    @click.option("--local-folder", type=click.Path(path_type=Path), help="Where a packed store is decoded.")
    @click.option(
        "--local-bytes",
        type=click.IntRange(1),
        help=f"Most bytes that a packed store takes there.  [default: {LOCAL_BYTES}]",
    )
    @functools.wraps(command)
    def wrapped(*, local_folder: Path | None, local_bytes: int | None, **given: Any) -> None:
        local = Local(folder=local_folder, bytes=local_bytes or LOCAL_BYTES) if local_folder or local_bytes else None
        command(**given, local=local)

    return wrapped
