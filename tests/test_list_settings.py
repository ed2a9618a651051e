"""`harvest settings`, `train settings`, and the helps of all commands."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import harvest.cli
import train.cli
from shared.check_settings import names_in
from shared.command_line import Commands
from shared.console.list_settings import list_settings
from shared.store.store import Store
from tests.stores import SyntheticStore
from train.run.settings import Settings, load_settings, resolve


def test_every_setting_is_listed_with_its_value_default_and_what_it_may_be() -> None:
    settings = load_settings("tiny", {"activation.kind": "jumprelu", "steps": 9})
    found = {one.name: one for one in list_settings(settings)}
    jumprelu = {name for name in names_in(Settings.model_json_schema()) if not name.startswith("activation.")}
    jumprelu |= {f"activation.{name}" for name in type(settings.activation).model_fields}
    assert set(found) == jumprelu
    assert (found["steps"].value, found["steps"].default, found["steps"].is_changed) == (9, 4000, True)
    assert found["log_every"].is_changed is False
    assert found["activation.kind"].allowed == "batchtopk or topk or jumprelu or relu"
    assert found["optimizer.beta1"].allowed == "number >= 0 < 1"
    assert found["optimizer.lr"].allowed == "number or auto > 0"
    assert all(one.told and one.allowed for one in found.values())


def test_the_settings_on_a_store_are_those_of_a_run(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    args = ["settings", "tiny", "--store", str(store.path), "--set", "transcoder.d_sae=8x", "--json"]
    done = CliRunner().invoke(train.cli.main, args, catch_exceptions=False)
    found = {one["name"]: one["value"] for one in json.loads(done.stdout)}
    settings = load_settings("tiny", ["transcoder.d_sae=8x"])
    expected = {one.name: one.value for one in list_settings(resolve(store, settings, None).settings)}
    assert found == json.loads(json.dumps(expected))
    assert found["transcoder.d_sae"] == 8 * store.record.d_in and found["kernels"] == "compiled"


def test_the_settings_of_a_harvest_are_listed_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["settings", "--layer", "2", "--set", "store.cap={0 = 8}", "--json"]
    done = CliRunner().invoke(harvest.cli.group, args, catch_exceptions=False)
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert found["capture.layers"]["value"] == [2] and found["capture.layers"]["default"] == [8]
    assert found["store.cap"]["value"] == {"0": 8} and found["tokens"]["default"] is None
    table = CliRunner().invoke(harvest.cli.group, ["settings"], catch_exceptions=False).stdout
    assert all(name in table for name in found) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [harvest.cli.group, train.cli.main], ids=["harvest", "train"])
def test_no_line_of_the_list_of_commands_is_cut(group: Commands) -> None:
    shown = CliRunner().invoke(group, ["--help"]).stdout
    assert "..." not in shown.partition("Commands:")[2]
    words = " ".join(shown.split())
    for name, one in group.commands.items():
        assert one.help
        assert f"{name} {' '.join(one.help.split()).split('. ')[0].rstrip('.')}" in words
