"""Exports for the Hugging Face hub, and pushing any export there: to a stand-in for the hub, on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import train as api
from shared.errors import ProjectError
from tests.hub_server import TOKEN, Hub, reach
from tests.runs import VALUES, Outcome
from tests.stores import make_store

Export = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    store = make_store(folder / "store", d_in=12, d_out=12, held_out_blocks=4)
    settings = api.load_settings("tiny", VALUES | {"steps": 20, "samples.rows": 0})
    return api.train(store.path, settings, folder / "run")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as served:
        yield served


@pytest.fixture
def export(run: Path, hub: Hub, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Export:
    """The command in this process."""

    def done(*options: object, address: str = hub.address, **reached: Any) -> Outcome:
        reach(monkeypatch, address, **reached)
        return command("export", run, "--quiet", *options)

    return done


def test_the_folder_for_the_hub_is_saelens_with_a_card_of_the_hub(run: Path, tmp_path: Path) -> None:
    path, (found,) = api.export(run, "hf", tmp_path / "out", licence="apache-2.0")
    api.export(run, "saelens", tmp_path / "same")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (path / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    card = ModelCard.load(path / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "saelens")
    assert {"transcoder", "sparse-autoencoder", "saelens"} <= set(card.data.tags)
    assert f"| unexplained variance (fvu) on held-out rows | {found.exported.fvu:.4f} |" in card.text
    assert f"| active latents per row | {found.exported.l0:.2f} |" in card.text


def test_a_card_says_that_the_licence_is_not_known_and_refuses_what_is_no_name(run: Path, tmp_path: Path) -> None:
    path = api.export(run, "hf", tmp_path / "out").path
    assert ModelCard.load(path / "README.md").data.license == "unknown"
    with pytest.raises(ProjectError, match="expected the hub's name of one, such as mit"):
        api.export(run, "hf", tmp_path / "other", licence="mit\nbase_model: x")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["hf", "sparsify"])
def test_a_push_uploads_every_file_as_it_is(export: Export, hub: Hub, tmp_path: Path, kind: str) -> None:
    done = export("--format", kind, "--out", tmp_path / "out", "--push", "someone/made", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["url"] == f"{hub.address}/someone/made" and told["path"] == str(tmp_path / "out")
    assert hub.files["someone/made"] == {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    assert (hub.made[0]["name"], hub.made[0].get("private")) == ("made", None)


def test_the_environment_says_where_the_hub_is(run: Path, hub: Hub, tmp_path: Path) -> None:
    """In a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    line = ("--format", "hf", "--out", tmp_path / "out", "--push", "someone/made", "--quiet")
    command = [sys.executable, "-m", "train", "export", str(run), *map(str, line)]
    done = subprocess.run(command, env=kept | given, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.files["someone/made"] == {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("part", [0, 1000])
def test_large_files_are_pushed_whole_or_in_parts(export: Export, hub: Hub, tmp_path: Path, part: int) -> None:
    """By Git LFS, as the hub asks for files of tensors."""
    hub.large = part
    line = ("--format", "hf", "--out", tmp_path / "out", "--push", "someone/made")
    done = export(*line)
    assert done.code == 0, done.err
    assert hub.files["someone/made"] == {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    weights = hashlib.sha256((tmp_path / "out" / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert hub.verified == set(hub.blobs) == {weights}


def test_a_large_file_that_is_refused_is_one_line(export: Export, hub: Hub, tmp_path: Path) -> None:
    hub.large, hub.refusal = 0, 403
    line = ("--format", "hf", "--out", tmp_path / "out", "--push", "someone/made")
    done = export(*line)
    assert done.code == 1 and "the hub answered 403: the token may not write there" in done.err, done.err
    assert len(done.err.splitlines()) == 1 and "someone/made" not in hub.files


def test_a_repository_is_made_private_when_asked_for(export: Export, hub: Hub, tmp_path: Path) -> None:
    done = export("--format", "hf", "--out", tmp_path / "out", "--push", "someone/made", "--private")
    assert done.code == 0, done.err
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"
    assert done.out.splitlines() == [f"{hub.address}/someone/made", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("options", "reached", "told"),
    [
        (("--push", "someone/made"), {"token": ""}, "--push needs a token"),
        (("--push", "made"), {}, "expected OWNER/NAME"),
        (("--push", "a/b/c"), {}, "expected OWNER/NAME"),
        (("--private",), {}, "--private is for --push"),
    ],
)
def test_what_a_push_lacks_is_said_before_anything_is_written(
    export: Export, hub: Hub, tmp_path: Path, options: tuple[str, ...], reached: dict[str, Any], told: str
) -> None:
    done = export("--format", "hf", "--out", tmp_path / "out", *options, **reached)
    assert done.code == 2 and told in done.err, done.err
    assert len(done.err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reached", "told"),
    [
        ("someone/made", {"token": "hf_wrong"}, "the hub answered 401: the token is not valid"),
        ("nobody/made", {}, "the hub answered 404: no such owner"),
        ("someone/made", {"address": "http://127.0.0.1:9"}, "the hub is out of reach"),
        ("someone/made", {"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_push_that_fails_is_one_line_and_loses_nothing(
    export: Export, hub: Hub, tmp_path: Path, name: str, reached: dict[str, Any], told: str
) -> None:
    out = tmp_path / "out"
    done = export("--format", "hf", "--out", out, "--push", name, **reached)
    assert done.code == 1 and told in done.err, done.err
    assert f"{out} is whole; then upload it with: hf upload {name} {out}" in done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert {one.name for one in out.iterdir()} == {"README.md", "cfg.json", "sae_weights.safetensors"}
    assert not hub.files


def test_a_commit_that_is_refused_is_one_line(export: Export, hub: Hub, tmp_path: Path) -> None:
    hub.refusal = 403
    done = export("--format", "hf", "--out", tmp_path / "out", "--push", "someone/made")
    assert done.code == 1 and "the hub answered 403: the token may not write there" in done.err, done.err
