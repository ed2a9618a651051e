import itertools
from pathlib import Path

import pytest
from pydantic import Field

from shared.config import Config, RenamedConfig, build, load_preset, override, read_record
from shared.errors import CorruptData, UserError
from train.run.settings import load_settings


class Loss(Config):
    auxk_weight: float = 0.03
    prefixes: tuple[int, ...] = (4, 8)


class Settings(Config):
    seed: int = 0
    """Seed of every draw."""
    learning_rate: float = Field(default=3e-4, gt=0)
    name: str | None = None
    loss: Loss = Loss()


def settings(*assignments: str) -> Settings:
    return build(Settings, override({}, assignments), "tiny")


def test_docstrings_of_fields_become_their_descriptions():
    assert Settings.model_fields["seed"].description == "Seed of every draw."


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("seed=-7", {"seed": -7}),
        ("seed = 7 ", {"seed": 7}),
        ("tokens=1_000_000", {"tokens": 1_000_000}),
        ("rate=3e-4", {"rate": 3e-4}),
        ("rate=.5", {"rate": ".5"}),
        ("on=true", {"on": True}),
        ("on=True", {"on": "True"}),
        ("edges=[0, 1, 4]", {"edges": [0, 1, 4]}),
        ("keep={0 = 0.5}", {"keep": {"0": 0.5}}),
        ("name=gemma-2-2b", {"name": "gemma-2-2b"}),
        ('name="7"', {"name": "7"}),
        ("name=a=b", {"name": "a=b"}),
        ("name=", {"name": ""}),
        ("path=/data/a b.txt", {"path": "/data/a b.txt"}),
        ("loss.auxk_weight=0.5", {"loss": {"auxk_weight": 0.5}}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
    ],
)
def test_set_parses_toml_and_takes_the_rest_as_text(assignment, expected):
    result = override({}, [assignment])
    assert result == expected
    assert type(next(iter(result.values()))) is type(next(iter(expected.values())))


def test_set_keeps_what_it_does_not_name_and_the_later_one_wins():
    before = {"seed": 1, "loss": {"auxk_weight": 0.1, "prefixes": [1]}}
    after = override(before, ["loss.auxk_weight=0.2", "loss.auxk_weight=0.3"])
    assert after == {"seed": 1, "loss": {"auxk_weight": 0.3, "prefixes": [1]}}
    assert before == {"seed": 1, "loss": {"auxk_weight": 0.1, "prefixes": [1]}}


def test_another_kind_drops_the_settings_of_the_one_before_only_where_kinds_are_variants():
    before = {"activation": {"kind": "topk", "k": 3}, "text": {"name": "a.jsonl", "kind": "text"}}
    lines = ["activation.kind=relu", "text.kind=messages"]
    after = override(before, lines, variants=("activation",))
    assert after == {"activation": {"kind": "relu"}, "text": {"name": "a.jsonl", "kind": "messages"}}
    assert override(before, ["activation.kind=topk"], variants=("activation",)) == before


@pytest.mark.parametrize("kind", ["activation.kind=relu", 'activation={kind = "relu"}'])
def test_another_kind_drops_no_setting_that_is_given_beside_it_in_any_order(kind):
    before = {"activation": {"kind": "topk", "k": 3, "k_start": 9}, "seed": 1}
    for lines in itertools.permutations([kind, "activation.k=5", "seed=2"]):
        after = override(before, lines, variants=("activation",))
        assert after == {"activation": {"kind": "relu", "k": 5}, "seed": 2}


@pytest.mark.parametrize("assignment", ["seed", "=1", " =1", ""])
def test_set_without_a_name_or_a_value_is_refused(assignment):
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        override({}, [assignment])


def test_set_into_a_value_is_refused():
    with pytest.raises(UserError, match=r"--set seed\.x=1: seed is a value, not a group"):
        override({"seed": 1}, ["seed.x=1"])


def test_the_settings_reach_their_fields():
    result = settings("seed=3", "learning_rate=1", "loss.prefixes=[2, 3]", "name=x")
    assert result == Settings(seed=3, learning_rate=1.0, name="x", loss=Loss(prefixes=(2, 3)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sed=1", "tiny: unknown option 'sed'; did you mean 'seed'?"),
        ("learn_rate=1", "tiny: unknown option 'learn_rate'; did you mean 'learning_rate'?"),
        ("loss.aux_weight=1", "tiny: unknown option 'loss.aux_weight'; did you mean 'loss.auxk_weight'?"),
        ("auxk_weight=1", "tiny: unknown option 'auxk_weight'; did you mean 'loss.auxk_weight'?"),
        ("los.auxk_weight=1", "tiny: unknown option 'los.auxk_weight'; did you mean 'loss.auxk_weight'?"),
        ("zzzzzz=1", "tiny: unknown option 'zzzzzz'; there are seed, learning_rate, name, loss.…"),
        ("loss.zzzzzz=1", "tiny: unknown option 'loss.zzzzzz'; there are loss.auxk_weight, loss.prefixes"),
    ],
)
def test_an_unknown_option_names_the_nearest(assignment, message):
    with pytest.raises(UserError) as error:
        settings(assignment)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("seed=1.5", ["tiny: seed = 1.5: not a whole number"]),
        ("seed=many", ["tiny: seed = many: not a whole number"]),
        ("seed=true", ["tiny: seed = True: not a whole number"]),
        ("learning_rate=0", ["tiny: learning_rate = 0: must be above 0"]),
        ("learning_rate=nan", ["tiny: learning_rate = nan: must be finite"]),
        ("learning_rate=inf", ["tiny: learning_rate = inf: must be finite"]),
        ("loss=3", ["tiny: loss = 3: not a group of settings"]),
        ("loss.prefixes=[1, 'x']", ["tiny: loss.prefixes.1 = x: not a whole number"]),
    ],
)
def test_a_bad_value_names_field_value_and_cause_in_one_line(assignment, parts):
    with pytest.raises(UserError) as error:
        settings(assignment)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (10**5000, "seed = a value too long to show: must be at most 9"),
        ("a\nb\x1b[31m", r"seed = a\nb\x1b[31m: not a whole number"),
        ("x" * 10**6, "x...: not a whole number"),
        ([1] * 10**6, "...]: not a whole number"),
    ],
    ids=["digits", "control", "long", "list"],
)
def test_a_value_that_cannot_be_shown_is_still_one_line(value: object, told: str) -> None:
    class Bounded(Config):
        seed: int = Field(0, le=9)

    with pytest.raises(UserError) as error:
        build(Bounded, {"seed": value}, "tiny")
    assert told in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        setattr(Settings(), "seed", 1)  # noqa: B010 - type checkers refuse the assignment


def test_a_record_of_ours_that_does_not_fit_is_corrupt():
    with pytest.raises(CorruptData, match=r"^/s/store\.json: unknown option 'sed'"):
        read_record(Settings, {"sed": 1}, Path("/s/store.json"))
    with pytest.raises(CorruptData, match=r"^/s/store\.json: settings: "):
        read_record(Settings, [1], Path("/s/store.json"))


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text("seed = 1\n[loss]\nauxk_weight = 0.5\n")
    (tmp_path / "gemma-2-2b.toml").write_text("seed = 2\n")
    return tmp_path


def test_a_preset_is_read(presets):
    assert load_preset(presets, "tiny", None) == {"seed": 1, "loss": {"auxk_weight": 0.5}}


def test_a_missing_preset_lists_those_there_are(presets):
    with pytest.raises(UserError) as error:
        load_preset(presets, "tinny", None)
    assert str(error.value) == "no preset 'tinny'; presets: gemma-2-2b, tiny; did you mean 'tiny'?"


@pytest.mark.fault(22)
def test_a_preset_is_no_way_out_of_its_folder(presets):
    inner = presets / "inner"
    inner.mkdir()
    with pytest.raises(UserError, match="no preset"):
        load_preset(inner, "../tiny", None)


def test_a_file_replaces_the_preset(presets, tmp_path):
    file = tmp_path / "mine.conf"
    file.write_text("seed = 9\n")
    assert load_preset(presets, "mine", file) == {"seed": 9}


@pytest.mark.parametrize("content", [b"seed = ", b"seed = 1\nseed = 2\n", b"name = '\xff'\n", b"[loss\n"])
def test_bad_toml_names_the_file(presets, tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.toml: cannot be read as TOML: "):
        load_preset(presets, "tiny", file)


def test_a_missing_file_and_a_folder_are_named(presets, tmp_path):
    with pytest.raises(UserError, match=r"no configuration file at .*none\.toml"):
        load_preset(presets, "tiny", tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read as TOML"):
        load_preset(presets, "tiny", tmp_path)


class Renamed(RenamedConfig):
    renamed = {"old": "new"}
    new: int = 0


def test_a_setting_is_read_by_the_name_it_had_with_a_warning_and_not_beside_the_new_one(capsys):
    assert build(Renamed, {"old": 3}, "tiny") == Renamed(new=3)
    assert capsys.readouterr().err == (
        "warning: tiny: old is now called new; the old name will be refused in the next version\n"
    )
    assert read_record(Renamed, {"old": 3}, Path("r.json")) == Renamed(new=3) and not capsys.readouterr().err
    with pytest.raises(UserError, match="unknown option 'old'"):
        build(Renamed, {"old": 3, "new": 4}, "tiny")


def test_changes_are_values_by_name_or_lines_and_no_text():
    changes = {"loss.prefixes": (2, 3), "name": None, "seed": 3}
    assert build(Settings, override({"name": "x"}, changes), "tiny") == Settings(seed=3, loss=Loss(prefixes=(2, 3)))
    assert override({}, {"loss": {"auxk_weight": 0.5}}) == {"loss": {"auxk_weight": 0.5}}
    with pytest.raises(UserError, match="a list of NAME=VALUE or a dictionary, got the text 'seed=3'"):
        override({}, "seed=3")


@pytest.mark.parametrize("name", ["int", "str", "float", "literal[x]"])
def test_a_setting_that_is_named_like_a_branch_of_a_union_is_one_line(name):
    with pytest.raises(UserError, match="tiny: unknown option"):
        settings(f"{name}=3")


def test_a_setting_of_another_kind_says_so():
    with pytest.raises(UserError, match=r"'activation.l0_coefficient'; it is a setting of another activation.kind"):
        load_settings("tiny", {"activation.l0_coefficient": 3})
