"""`harvest push` and `pull`: a packed store to and from a stand-in for the Hugging Face hub, on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.hub_server import TOKEN, Hub
from tests.llms import ROOT, contents, edit_json
from tests.stores import SyntheticStore, make_store, stock_rows

NAME = "someone/rows"
SHARDS = "activations.zarr/strata"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("raw") / "store", tokenizer=True)


@pytest.fixture(scope="module")
def packed(raw: SyntheticStore) -> Path:
    from tests.llms import command

    path = raw.path.with_name("packed")
    assert command("pack", raw.path, path).code == 0
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as served:
        served.large = 0  # shards come by Git LFS, as the hub asks for files that are no text
        yield served


def begin(hub: Hub | str, *line: object, limit: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own: the library takes the hub's address when it is imported."""
    where = hub if isinstance(hub, str) else hub.address
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": where, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    return subprocess.Popen(
        [*limit, sys.executable, "-m", "harvest", *map(str, line), "--quiet"],
        cwd=ROOT, env={**kept, **given, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def call(hub: Hub | str, *line: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = begin(hub, *line, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_pull_gives_what_was_pushed_and_a_stranger_can_open_it(
    raw: SyntheticStore, packed: Path, hub: Hub, tmp_path: Path
) -> None:
    assert call(hub, "push", packed, NAME) == (0, f"{hub.address}/{NAME}\n", "")
    made = hub.made[0]
    assert made["type"] == "dataset" and (made.get("private") is True or made.get("visibility") == "private")
    there = contents(packed)
    assert {name: data for name, data in hub.files[NAME].items() if name != "README.md"} == there
    code, out, err = call(hub, "pull", NAME, "--cache", tmp_path, "--json")
    path = tmp_path / raw.record.request.folder
    assert (code, json.loads(out), err) == (0, {"path": str(path)}, "")
    assert contents(path) == there
    for name, rows in raw.arrays.items():
        assert (stock_rows(path, name) == rows).all()


def test_the_card_says_what_the_rows_are_and_its_code_reads_them(
    raw: SyntheticStore, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from harvest.commands.store_card import store_card
    from shared.store.store import Store

    card = store_card(Store.open(packed), NAME)
    front = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in front and "zarr" in front["tags"]
    assert "license: mit\n" in store_card(Store.open(packed), NAME, "mit")
    for said in ("synthetic, layer 3", "blocks.3.hook_mlp_out` [24]", "| type | bfloat16 |", f"pull {NAME}"):
        assert said in card
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: str(packed))
    code = card.split("later):\n")[1].split("With the project")[0]
    found: dict[str, np.ndarray] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), found)
    last = f"strata/{raw.record.plan.stored_strata[-1].name}"
    rows = raw.values(f"{last}/source")[:256]
    assert (found["rows"] == rows).all()
    windows, places = (raw.arrays[f"{last}/{name}"][:256] for name in ("sequence", "offset"))
    assert (found["tokens"] == raw.arrays["tokens"][windows, places]).all()


@pytest.mark.parametrize("after", [2, 9])
def test_a_push_that_is_killed_goes_on(packed: Path, hub: Hub, after: int) -> None:
    """At a request of the first commits, and while shards are sent; what is committed is not sent again."""
    monkeypatched = "import harvest.commands.hub_store as m; m.COMMIT_FILES = 8; from harvest.cli import main; main()"
    line = [sys.executable, "-c", monkeypatched, "push", str(packed), NAME, "--quiet"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    running: list[subprocess.Popen[bytes]] = []
    commits: list[str] = []

    def kill(method: str, path: str) -> None:
        commits.extend([path] if "/commit/" in path else [])
        if len(commits) == after:
            running[0].send_signal(signal.SIGKILL)

    hub.asked = kill
    running.append(subprocess.Popen(line, cwd=ROOT, env=environment))
    assert running[0].wait(timeout=120) == -signal.SIGKILL
    assert "store.json" not in hub.files[NAME]
    before, sent = dict(hub.files[NAME]), []
    hub.asked = lambda method, path: sent.extend([path] if method == "PUT" else [])
    running.append(subprocess.Popen(line, cwd=ROOT, env=environment))
    assert running[1].wait(timeout=120) == 0
    assert {name: data for name, data in hub.files[NAME].items() if name != "README.md"} == contents(packed)
    shards = [name for name in hub.files[NAME] if name.endswith("/0")]
    assert len(sent) <= len([name for name in shards if name not in before])
