"""`harvest push` and `pull`: a packed store to and from a stand-in for the Hugging Face hub, on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.hub_server import TOKEN, Hub, reach
from tests.llms import ROOT, Outcome, command, contents
from tests.object_server import Bucket
from tests.stores import SyntheticStore, make_store, stock_rows

NAME = "someone/rows"
SHARDS = "activations.zarr/strata"
MOMENTS = "ledger/000001.moments.safetensors"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("raw") / "store", training_blocks=1, tokenizer=True)


@pytest.fixture(scope="module")
def packed(raw: SyntheticStore) -> Path:
    path = raw.path.with_name("packed")
    assert command("pack", raw.path, path).code == 0
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as served:
        served.large = 0  # shards come by Git LFS, as the hub asks for files that are no text
        yield served


def environment_of(hub: Hub) -> dict[str, str]:
    """The library takes the hub's address when it is imported: commands run in processes of their own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    return kept | given


def begin(hub: Hub, *line: object, limit: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [*limit, sys.executable, "-m", "harvest", *map(str, line), "--quiet"],
        cwd=ROOT, env=environment_of(hub) | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the command in this process, for what needs no kill."""
    reach(monkeypatch, hub.address)
    return lambda *line: command(*line, "--quiet")


def test_a_pull_gives_what_was_pushed_and_a_stranger_can_open_it(
    raw: SyntheticStore, packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert here("push", packed, NAME) == Outcome(0, f"{hub.address}/{NAME}\n", "")
    made = hub.made[0]
    assert made["type"] == "dataset" and (made.get("private") is True or made.get("visibility") == "private")
    there = contents(packed)
    assert {name: data for name, data in hub.files[NAME].items() if name != "README.md"} == there
    done = here("pull", NAME, "--cache", tmp_path, "--json")
    path = tmp_path / raw.record.request.folder
    assert (done.code, json.loads(done.out), done.err) == (0, {"path": str(path)}, "")
    assert contents(path) == there
    for name, rows in raw.arrays.items():
        assert (stock_rows(path, name) == rows).all()


@pytest.mark.fault(63)
def test_a_store_in_object_storage_is_pushed_as_the_local_one(
    packed: Path, hub: Hub, here: Callable[..., Outcome], bucket: Bucket, tmp_path: Path
) -> None:
    """File by file: damage is met before the file is sent, and what is there is not sent again."""
    address = bucket.upload(packed, "packed")
    for damaged in (f"{SHARDS}/004-016/source/c/1/0", MOMENTS, "tokenizer/tokenizer.json"):
        whole = bucket.get(f"packed/{damaged}")
        bucket.put(f"packed/{damaged}", whole[:-1] + bytes([whole[-1] ^ 1]))
        done = here("push", address, NAME)
        assert done.code == 1 and f"{address}/{damaged}: crc32c" in done.err and "pack the store again" in done.err
        assert damaged not in hub.files[NAME] and "store.json" not in hub.files[NAME]
        bucket.put(f"packed/{damaged}", whole)
    assert here("push", address, NAME).code == 0
    assert {name: data for name, data in hub.files[NAME].items() if name != "README.md"} == contents(packed)
    asked: list[str] = []
    hub.asked = lambda method, path: asked.append(path)
    assert here("push", address, NAME).code == 0 and asked and not [one for one in asked if "/commit/" in one]
    assert not list(tmp_path.glob("opened-objects-*"))
    refused = here("pull", NAME, "--cache", bucket.address)
    assert refused.code == 2 and "aws s3 sync" in refused.err


def test_the_card_says_what_the_rows_are_and_its_code_reads_them(
    raw: SyntheticStore, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.commands.store_card import store_card
    from shared.store.store import Store

    card = store_card(Store.open(packed), NAME)
    front = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in front and "zarr" in front["tags"]
    assert "license: mit\n" in store_card(Store.open(packed), NAME, "mit")
    for said in ("synthetic, layer 3", "blocks.3.hook_mlp_out` [24]", "| type | bfloat16 |", f"pull {NAME}"):
        assert said in card
    found = run_code(card, packed, monkeypatch)
    last = f"strata/{raw.record.plan.stored_strata[-1].name}"
    rows = raw.values(f"{last}/source")[:256]
    assert (found["rows"] == rows).all()
    windows, places = (raw.arrays[f"{last}/{name}"][:256] for name in ("sequence", "offset"))
    assert (found["tokens"] == raw.arrays["tokens"][windows, places]).all()


def run_code(card: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What the card's lines leave, run on the store at `path` in place of a download."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: str(path))
    code = card.split("later):\n")[1].split("With the project")[0]
    found: dict[str, np.ndarray] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), found)
    return found


def test_int8_rows_come_back_whole_and_the_cards_code_reads_them(
    hub: Hub, here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_store(tmp_path / "int8", training_blocks=1, tokenizer=True, storage="int8")
    packed = tmp_path / "packed"
    assert command("pack", raw.path, packed).code == 0
    assert here("push", packed, NAME).code == 0 and here("pull", NAME, "--cache", tmp_path).code == 0
    pulled = tmp_path / raw.record.request.folder
    assert contents(pulled) == contents(packed) and command("verify", pulled).code == 0
    last = raw.record.plan.stored_strata[-1].name
    found = run_code(hub.files[NAME]["README.md"].decode(), pulled, monkeypatch)
    assert (found["rows"] == raw.values(f"strata/{last}/source")[:256]).all()


@pytest.mark.fault(63)
@pytest.mark.parametrize("after", [2, 9])
def test_a_push_that_is_killed_goes_on(packed: Path, hub: Hub, after: int) -> None:
    """At a request of the first commits, and while shards are sent; what is committed is not sent again."""
    monkeypatched = "import harvest.commands.hub_store as m; m.COMMIT_FILES = 8; from harvest.cli import main; main()"
    line = [sys.executable, "-c", monkeypatched, "push", str(packed), NAME, "--quiet"]
    environment = environment_of(hub)
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
    large = [name for name in hub.files[NAME] if name.endswith((".safetensors", "/0"))]
    assert len(sent) <= len([name for name in large if name not in before])


@pytest.mark.fault(63)
def test_a_pull_that_is_killed_goes_on_and_mends_what_was_damaged(packed: Path, hub: Hub, tmp_path: Path) -> None:
    """Killed once most files are there; one of them is damaged then, and fetched again with those that are missing."""
    hub.files[NAME] = contents(packed)
    running: list[subprocess.Popen[str]] = []
    got: list[str] = []

    def kill(method: str, path: str) -> None:
        got.extend([path] if method == "GET" and "/resolve/" in path else [])
        if len(got) == 40 and len(running) == 1:
            running[0].send_signal(signal.SIGKILL)

    hub.asked = kill
    running.append(begin(hub, "pull", NAME, "--cache", tmp_path))
    assert running[0].wait(timeout=120) == -signal.SIGKILL
    (path,) = (one for one in tmp_path.iterdir() if one.is_dir())
    assert not (path / "store.json").exists()
    there = sorted(one for one in path.rglob("c/*/0") if one.is_file() and "pull" not in one.parts)
    there[0].write_bytes(b"x" + there[0].read_bytes()[1:])
    got.clear()
    running.append(begin(hub, "pull", NAME, "--cache", tmp_path))
    assert running[1].wait(timeout=120) == 0
    assert contents(path) == contents(packed)
    assert 0 < len(got) <= len(contents(packed)) - len(there) + 6


def test_a_store_that_grew_is_pushed_to_the_same_data_set(
    packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path
) -> None:
    raw = make_store(tmp_path / "store", training_blocks=2, tokenizer=True).path
    assert command("pack", raw, tmp_path / "longer").code == 0
    assert here("push", packed, NAME).code == here("pull", NAME, "--cache", tmp_path / "cache").code == 0
    before = {name for name in contents(packed) if contents(packed)[name] == contents(tmp_path / "longer").get(name)}
    assert sum(name.endswith("/0") for name in before) > 20
    sent: list[str] = []
    hub.asked = lambda method, path: sent.extend([path] if method == "PUT" else [])
    assert here("push", tmp_path / "longer", NAME).code == 0
    there = contents(tmp_path / "longer")
    assert {name: hub.files[NAME][name] for name in there} == there
    assert len(sent) <= len(there) - len(before)
    done = here("pull", NAME, "--cache", tmp_path / "cache")
    assert done.code == 2 and "holds another number of blocks than the repository" in done.err
    done = here("pull", NAME, "--cache", tmp_path / "other")
    assert done.code == 0 and contents(Path(done.out.strip())) == there


def test_what_a_push_cannot_do_is_one_line_and_sends_nothing(
    raw: SyntheticStore, packed: Path, hub: Hub, here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = here("push", raw.path, NAME)
    assert done.code == 2 and "is not packed; pack it first" in done.err
    with monkeypatch.context() as without:
        without.setenv("HF_TOKEN", "")
        done = here("push", packed, NAME)
    assert done.code == 2 and "push needs a token" in done.err
    assert not hub.made
    done = here("push", packed, "nobody/rows")
    assert done.code == 1 and "the hub answered 404: no such owner" in done.err and "run it again to go on" in done.err
    for files, told in (({"request.json": b"{}\n"}, "holds another store"), ({"a.txt": b""}, "such as a.txt")):
        hub.files[NAME] = dict(files)
        done = here("push", packed, NAME)
        assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1
        assert hub.files[NAME] == files


@pytest.mark.fault(63)
@pytest.mark.parametrize("damaged", [f"{SHARDS}/004-016/source/c/1/0", MOMENTS])
def test_a_damaged_file_is_not_pushed(
    packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path, damaged: str
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    file = copy / damaged
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = here("push", copy, NAME)
    assert done.code == 1 and str(file) in done.err and "crc32c" in done.err
    assert "store.json" not in hub.files[NAME]


def test_what_a_pull_cannot_do_is_one_line(
    packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name, told, expected in ((NAME, "the hub answered 404", 1), ("rows", "expected OWNER/NAME", 2)):
        done = here("pull", name, "--cache", tmp_path)
        assert done.code == expected and told in done.err and len(done.err.splitlines()) == 1
    hub.files[NAME] = {name: data for name, data in contents(packed).items() if name != "store.json"}
    done = here("pull", NAME, "--cache", tmp_path)
    assert done.code == 2 and "holds no whole packed store: it has no store.json" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(
    raw: SyntheticStore, packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path
) -> None:
    hub.files[NAME] = contents(packed)
    path = Path(shutil.copytree(raw.path, tmp_path / raw.record.request.folder))
    done = here("pull", NAME, "--cache", tmp_path)
    assert done.code == 2 and "is there already, unpacked" in done.err
    assert contents(path) == contents(raw.path)


@pytest.mark.fault(63)
def test_a_shard_that_is_not_what_the_records_say_is_refused(
    packed: Path, hub: Hub, here: Callable[..., Outcome], tmp_path: Path
) -> None:
    hub.files[NAME] = contents(packed)
    shard = min(name for name in hub.files[NAME] if name.endswith("/0"))
    hub.files[NAME][shard] += b"x"
    done = here("pull", NAME, "--cache", tmp_path)
    assert done.code == 1 and f"{shard} is not there as packed.json and store.json say" in done.err


@pytest.mark.fault(63)
def test_a_full_disk_ends_a_pull_that_can_go_on(packed: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files[NAME] = contents(packed)
    process = begin(hub, "pull", NAME, "--cache", tmp_path, limit=("prlimit", "--fsize=3000"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "disk full" in err and len(err.splitlines()) == 1, err
    assert begin(hub, "pull", NAME, "--cache", tmp_path).wait(timeout=120) == 0
