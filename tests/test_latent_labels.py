"""What people call latents: files of it are merged into a run's, and wrong ones are refused with a reason."""

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from train.explain.explanation_record import Asked, Explanation, Score, append, begin
from train.report.latent_labels import FILE, LatentLabel, explained, merge_labels, read_labels


def merged(run: Path, name: str, text: str) -> list[LatentLabel]:
    (run / name).write_text(text)
    return merge_labels(run, 30, 64, run / name).latents


def test_later_labels_replace_earlier_ones_and_empty_ones_remove_them(tmp_path: Path) -> None:
    assert read_labels(tmp_path).latents == []
    merged(tmp_path, "one.csv", 'latent,label\n5,"five, or so"\n3,three\n')
    found = merged(tmp_path, "two.CSV", "latent,label,note,star\n3,,,\n9,,,TRUE\n5,Five,why,no\n")
    assert found == [LatentLabel(latent=5, label="Five", note="why"), LatentLabel(latent=9, star=True)]
    assert read_labels(tmp_path).latents == found
    assert json.loads((tmp_path / FILE).read_text())["step"] == 30


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "latent,label\n64,x\n", "labels latent 64, and .* has 64 latents"),
        ("a.csv", "id,label\n1,x\n", "its columns are id, label; expected latent, label"),
        ("a.csv", "latent,label\n1\n", "row 1 does not have the 2 columns"),
        ("a.csv", "latent,label\none,x\n", r"latents\.0\.latent"),
        ("a.json", "[1, 2]", r"a\.json"),
        ("a.json", "{", "cannot be read as labels"),
        ("a.json", '{"latents": [{"latent": 1, "lable": "x"}]}', "lable"),
    ],
)
def test_a_wrong_file_is_refused_and_changes_nothing(tmp_path: Path, name: str, text: str, told: str) -> None:
    merged(tmp_path, "good.csv", "latent,label\n1,one\n")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=told):
        merged(tmp_path, name, text)
    assert (tmp_path / FILE).read_bytes() == before


def test_labels_of_a_model_are_taken_for_their_checkpoint_and_store_alone(tmp_path: Path) -> None:
    asked = Asked(store="a" * 64, step=30, model="judge", temperature=0.0, seed=0)
    begin(tmp_path, asked)
    half, none = Score(asked=4, hits=1, active=2, false_alarms=0), Score(asked=0, hits=0, active=0, false_alarms=0)
    append(tmp_path, Explanation(latent=3, label="three", detection=half, fuzzing=none, tokens=9))
    note = "by judge: detection 75%, fuzzing not known"
    assert explained(tmp_path, 30, "a" * 64) == [LatentLabel(latent=3, label="three", note=note)]
    assert explained(tmp_path, 31, "a" * 64) == explained(tmp_path, 30, "b" * 64) == []


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of labels at .*none\.json"):
        merge_labels(tmp_path, 30, 64, tmp_path / "none.json")
