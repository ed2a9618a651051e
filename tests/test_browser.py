"""The helper that pages are tested with notices what goes wrong on one."""

from pathlib import Path

import pytest

from tests.browser import open_page

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_browser")]


def written(folder: Path, body: str) -> Path:
    path = folder / "a page.html"
    path.write_text(f'<!doctype html><html lang="en"><link rel="icon" href="data:,"><p>text</p>{body}', "utf-8")
    return path


def test_a_page_is_opened_as_asked(tmp_path: Path) -> None:
    page_file = written(tmp_path, '<p id="a">there</p>')
    with open_page(page_file, width=360, height=640, dark=True, fragment="#a") as page:
        assert page.inner_text("#a") == "there" and page.evaluate("location.hash") == "#a"
        assert page.evaluate("innerWidth") == 360
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<script>console.error('so')</script>", "error: so"),
        ("<script>throw new Error('thrown here')</script>", "thrown here"),
        ("<script src='missing.js'></script>", "missing.js"),
        ("<img src='http://example.invalid/a.png'>", "example.invalid"),
        ("<script>alert(1)</script>", "dialog: 1"),
    ],
)
def test_what_goes_wrong_on_a_page_fails_its_test(tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(AssertionError, match=told), open_page(written(tmp_path, body)) as page:
        page.wait_for_timeout(300)
