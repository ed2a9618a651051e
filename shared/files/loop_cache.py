"""Where numba keeps compiled loops when it may write neither beside the code nor into the home folder."""

import os
import stat
import tempfile
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def place_compiled_loops(package: Path) -> None:
    """Set numba's variable to a folder of temporary files if it could not write beside `package` or into the home.

    Numba keeps loops in `__pycache__` beside their code, or else in the user's cache folder, and fails where neither
    can be written, as in a container with read-only packages and no home. To be called before numba is imported.
    """
    if VARIABLE not in os.environ and not os.access(package, os.W_OK) and not _has_home():
        os.environ[VARIABLE] = str(_own_folder())


def _has_home() -> bool:
    """Tell whether the user's cache folder can be written; makes numba's place in it, as numba does."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "numba")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder is known
        return False
    return os.access(folder, os.W_OK)


def _own_folder() -> Path:
    """Return a folder that is kept between processes, else a new one. Never another user's: its files are executed."""
    folder = Path(tempfile.gettempdir(), f"transcoder-cache-loops-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="transcoder-cache-loops-"))
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if private else Path(tempfile.mkdtemp(prefix="transcoder-cache-loops-"))
