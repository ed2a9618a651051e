"""A real browser for pages on disk: Debian's Chromium through Playwright, which downloads nothing here.

    with open_page(path) as page:
        page.get_by_role("button", name="max").click()

The page has no network, and a context of its own. On leaving, whatever it printed as an error, threw, was refused by
its content security policy or failed to load fails the test.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
_INSTALL = "apt-get install -y --no-install-recommends chromium"
_SECONDS = 200
"""Of an installation; pytest-timeout ends a test after 300."""
_kept: list[Any] = []
"""The browser that is started already, if one is."""


@contextmanager
def open_page(
    path: Path, width: int = 1280, height: int = 800, dark: bool = False, fragment: str = ""
) -> Iterator[Any]:
    """A Playwright page of the file at `path`, loaded. Raises `AssertionError` on leaving when anything went wrong.

    Skips the test where there is no browser. A width below 600 is a phone with a touch screen.
    """
    wrong = list[str]()

    def dismissed(dialog: Any) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    with nullcontext(_kept[0]) if _kept else _launched() as browser:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            has_touch=width < 600,
            offline=True,
        )
        try:
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda m: wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else 0)
            page.on("pageerror", lambda error: wrong.append(f"thrown: {error}"))
            page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url} ({request.failure})"))
            page.on("dialog", dismissed)
            page.goto(path.resolve().as_uri() + fragment)
            yield page
        finally:
            context.close()
    if wrong:
        raise AssertionError("\n".join(wrong))


@contextmanager
def one_browser() -> Iterator[None]:
    """Start a browser once for all pages that are opened meanwhile. Playwright's event loop runs until it is left."""
    with _launched() as browser:
        _kept.append(browser)
        try:
            yield
        finally:
            _kept.clear()


@contextmanager
def _launched() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = chromium()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=ARGS)
        try:
            yield browser
        finally:
            browser.close()


@cache
def chromium() -> str:
    """The browser's executable, installed if need be and possible; skips the test where there is none."""
    if not (found := _found()) and os.geteuid() == 0 and shutil.which("apt-get"):
        _install()
        found = _found()
    if not found:
        pytest.skip(f"no Chromium; install it with `{_INSTALL}`, or name one in CHROMIUM")
    return found


def _found() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def _install() -> None:
    """Once, although tests run in several processes; one that fails leaves a mark, so that no other waits as long."""
    place = Path(tempfile.gettempdir()) / f"transcoder-cache-chromium-{os.getppid()}"  # workers have one parent
    try:
        with FileLock(f"{place}.lock", timeout=_SECONDS):
            if _found() or place.exists():
                return
            env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            for command in ("apt-get update", _INSTALL):
                subprocess.run(
                    command.split(),
                    env=env,
                    timeout=_SECONDS // 2,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            place.touch()
    except (Timeout, subprocess.TimeoutExpired):
        place.touch()
