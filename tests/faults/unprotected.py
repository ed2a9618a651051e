"""Take each protection out, in a copy of the tree, and see that the tests that are to show it fail.

`python -m tests.faults.unprotected [NUMBER ...]`: those of some promises, or all. An entry of `protections.py` whose
text is no longer there, or whose tests pass all the same, is an error.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.inject import ROOT
from tests.faults.protection import Protection
from tests.faults.protections import PROTECTIONS

FAILED, SECONDS = 1, 900


def copy_tree(folder: Path) -> None:
    """All files that git knows, as they are now."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda one: (ROOT / one).is_file(), names.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def wrong(protection: Protection, tree: Path) -> str | None:
    """Take a protection out of `tree`, run each of its tests, and put it back; says what is wrong, or None."""
    file = tree / protection.file
    before = file.read_text()
    if before.count(protection.text) != 1:
        return f"its text is there {before.count(protection.text)} times"
    file.write_text(before.replace(protection.text, protection.without))
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        for test in protection.tests:
            line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=240", test]
            done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode != FAILED:
                end = " ".join(done.stdout.splitlines()[-2:])
                return f"{test} does not fail: exit code {done.returncode}: {end}"
            print(f"    {test.partition('::')[2]}: {reason(done.stdout)}", flush=True)
    finally:
        file.write_text(before)
    return None


def reason(text: str) -> str:
    """The first line that says how a test failed."""
    lines = [line for line in text.splitlines() if line.startswith("E   ")]
    return " ".join(lines[0].split())[:150] if lines else "timed out"


def main() -> None:
    """Try those of the numbers given."""
    numbers = {int(text) for text in sys.argv[1:]}
    chosen = [one for one in PROTECTIONS if not numbers or numbers & set(one.numbers)]
    found = []
    with tempfile.TemporaryDirectory(prefix="unprotected-") as folder:
        copy_tree(Path(folder))
        for protection in chosen:
            name = f"{', '.join(map(str, protection.numbers))}: {protection.file}, {protection.text.strip()[:60]!r}"
            print(name, flush=True)
            if problem := wrong(protection, Path(folder)):
                found.append(f"{name}: {problem}")
                print(f"    NOT SEEN: {problem}", flush=True)
    print(f"{len(chosen)} protections, {len(found)} not seen to be missed")
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
