"""Replays what fuzzing found (`python -m tests.faults.fuzz`) without atheris: every input is harmless, for ever."""

from pathlib import Path

import pytest

from tests.faults.targets import TARGETS, seeds

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(CORPUS.rglob("*")) if CORPUS.is_dir() else []

pytestmark = [pytest.mark.fault(21), pytest.mark.timeout(120)]


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_does_no_harm(target: str) -> None:
    found = sorted(path for path in (CORPUS / target).iterdir() if path.is_file())
    assert found, f"no corpus of {target}"
    for path in found:
        try:
            TARGETS[target](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.name} ({len(path.read_bytes())} bytes): {error!r}") from error


def test_sound_files_do_no_harm_and_every_target_has_some() -> None:
    found = list(seeds())
    assert {target for target, _ in found} == set(TARGETS)
    for target, data in found:
        TARGETS[target](data)


def test_the_corpus_is_small() -> None:
    files = [path for path in INPUTS if path.is_file()]
    assert {path.parent.name for path in files} == set(TARGETS)
    assert len(files) < 200 and sum(path.stat().st_size for path in files) < 300_000
