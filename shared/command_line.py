"""Runs a click group and maps every error a user can meet to one line on stderr and an exit code; shared options."""

import errno
import functools
import io
import math
import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from shared.console.process import let_idle_threads_sleep
from shared.console.terminal import Verbosity, with_verbosity
from shared.errors import ProjectError, Stopped, UserError, printable, tell
from shared.store.find_store import cache_folder, find_store, stores_in
from shared.store.packed import LOCAL_BYTES
from shared.store.store import Local

_NO_MEMORY = "out of memory; free some, raise the limit (ulimit -v), or ask for less at once"
_TORCH_NO_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory")
"""What torch says of a GPU, and of the CPU; torch is not imported here."""
_MOST_NUMBERS = 10**6
"""Of a range on the command line."""
_REMEDIES = {
    errno.ENOMEM: "; free some memory, raise the limit (ulimit -v), or ask for less at once",
    errno.EMFILE: "; raise the limit on open files: ulimit -n 4096",
    errno.ENFILE: "; the whole system has too many; close some programs",
    errno.EACCES: "; change its permissions, or name another folder",
    errno.EROFS: "; name a folder that can be written, such as --out FOLDER of train export",
}


class Commands(click.Group):
    """A group whose list of commands shows the whole first sentence of each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the whole first sentence of its help."""
        rows = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class CountType(click.ParamType):
    """A whole number, which can be written short: 5M, 10k, 2.5B, 1e9."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number. Fails with what can be written."""
        text = str(value).replace("_", "").replace(",", "").strip()
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)([kmbKMBG]?)", text)
        number = Decimal(found[1]) * _THOUSANDS[found[2].lower()] if found else Decimal("0.5")
        if number != int(number) or number < 1:
            self.fail(f"{value!r}: not a whole number above 0; write it as 5000000, 5M, 10k or 1e9", param, ctx)
        return int(number)


class StoreType(click.ParamType):
    """A store: its folder, its name in the cache, or its address in object storage."""

    name = "store"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the folder. Raises `UserError` on a folder of stores, and on a name that no store has."""
        return find_store(Path(value), (ctx.params.get("cache") if ctx else None))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """List the stores of the cache, beside folders."""
        names = [CompletionItem(name) for name in stores_in(cache_folder()) if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="dir")]


version_option = click.version_option(package_name="transcoder-cache", message="%(package)s %(version)s")

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
COUNT, STORE = CountType(), StoreType()


def run(group: click.Group) -> None:
    """Run `group` on `sys.argv` and exit: 0 done, 1 failed, 2 the user's input, 3 stopped and resumable."""
    let_idle_threads_sleep()
    if isinstance(sys.stdout, io.TextIOWrapper):  # bytes of a path go out as they came in
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")
    try:
        _require_current_folder()
        _refuse_empty_arguments()
        group.main(standalone_mode=False)
    except ProjectError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}{_REMEDIES.get(error.errno or 0, '')}", 1)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else group.name
        _fail(f"{error.format_message()}  (see: {command} --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped; run the same command again to continue", Stopped.exit_code)
    except MemoryError:
        _fail(_NO_MEMORY, 1)
    except RuntimeError as error:
        if any(words in f"{type(error).__name__}: {error}" for words in _TORCH_NO_MEMORY):
            _fail(_NO_MEMORY, 1)
        if "can't start new thread" not in str(error):
            raise
        _fail("the system refuses another thread; raise the limit on processes (ulimit -u, or the job's)", 1)


def _require_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder was removed; change to one that is there: cd FOLDER") from error


def _refuse_empty_arguments() -> None:
    """Raise `UserError` on an argument with nothing in it: it would be taken for the current folder, or for none."""
    for before, given in pairwise(sys.argv):
        if not given:
            raise UserError(f"the argument after {before} is empty; if it was to come from a variable, that is not set")
        if re.fullmatch("--[a-z-]+=", given):
            raise UserError(f"{given} has no value; if it was to come from a variable, that is not set")


def _fail(message: str, code: int) -> None:
    tell("error: " + printable(" ".join(message.split())))
    sys.exit(code)


class Numbers(click.ParamType):
    """Numbers and ranges, both ends included: `3,17,100-120`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return them in the given order."""
        if not isinstance(value, str):
            return list(value)
        found: list[int] = []
        for part in value.split(","):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            if not re.fullmatch("[0-9]{1,9}", first) or (dash and not re.fullmatch("[0-9]{1,9}", last)):
                self.fail(f"{part!r} is neither a number nor a range of them, such as 3,17,100-120", param, ctx)
            if not 0 <= int(last or first) - int(first) <= _MOST_NUMBERS:
                self.fail(f"{part!r} is not a range of up to {_MOST_NUMBERS:,} numbers, the smaller first", param, ctx)
            found += range(int(first), int(last or first) + 1)
        return found


class NumberAndValue(click.ParamType):
    """A number and what it gets: `906=12.5`."""

    name = "number=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Return both."""
        if not isinstance(value, str):
            return int(value[0]), float(value[1])
        number, _, given = value.partition("=")
        try:
            if re.fullmatch("[0-9]{1,9}", number.strip()) and math.isfinite(found := float(given)):
                return int(number), found
        except ValueError:
            pass
        self.fail(f"{value!r} is not LATENT=VALUE, such as 906=12.5", param, ctx)


def local_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add options that say where rows of a packed store or of objects are kept; they become the argument `local`."""

    @click.option(
        "--local-folder",
        type=click.Path(path_type=Path),
        help="Folder for the rows of a packed store, or of one in object storage.",
    )
    @click.option(
        "--local-bytes",
        type=click.IntRange(1),
        help=f"Maximum size of the store in that folder, in bytes.  [default: {LOCAL_BYTES}]",
    )
    @functools.wraps(command)
    def wrapped(*, local_folder: Path | None, local_bytes: int | None, **given: Any) -> None:
        local = Local(folder=local_folder, bytes=local_bytes or LOCAL_BYTES) if local_folder or local_bytes else None
        command(**given, local=local)

    return wrapped


yes_option = click.option("--yes", is_flag=True, help="Remove without asking.")


def confirm_removal(path: Path, taken: int) -> bool:
    """Ask whether `path` of `taken` bytes is to be removed. Raises `UserError` where there is nobody to ask."""
    from shared.console.panel import size

    question = f"remove {path} ({size(taken)})?"
    if not sys.stdin.isatty():
        raise UserError(f"{question} There is no terminal to ask on; pass --yes to remove it")
    return click.confirm(printable(question))


_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print only warnings, errors and the result.")
_verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print every logged figure.")


def verbosity_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--quiet` and `--verbose`: how much the command says."""
    return _quiet_option(_verbose_option(_speaking(command)))


def quiet_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--quiet` alone, for a command that has no more to say than how far it is."""
    return _quiet_option(_speaking(command))


def verbose_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--verbose` alone, for a command whose result is what there is to say."""
    return _verbose_option(_speaking(command))


def _speaking(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*, quiet: bool = False, verbose: bool = False, **given: Any) -> None:
        if quiet and verbose:
            raise UserError("--quiet and --verbose cannot be combined; give one of them")
        with with_verbosity(Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL):
            command(**given)

    return wrapped
