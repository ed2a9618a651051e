"""Labels of latents from a language model: what is asked, how answers are read, the command against a small server."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.chat_server import KEY, TOKENS, Chat
from tests.runs import Outcome
from train.explain import server as server_module
from train.explain.excerpts import silent_windows, wrong_marks
from train.explain.explanation_record import FILE, Score
from train.explain.questions import Excerpt, ask_label, marked_text, read_decisions, read_label
from train.report.latent_labels import merge_labels, names_of_latents
from train.samples.encode import Activations

Command = Callable[..., Outcome]


def test_tokens_above_a_share_of_the_largest_activation_are_marked_and_listed():
    excerpt = Excerpt(["a", " b", " c", "\nd", "e"], [0.0, 4.0, 2.0, 1.0, 8.0])
    assert excerpt.marked == [False, True, False, False, True]
    asked = ask_label([excerpt], largest=16.0)
    assert asked.user == 'Excerpt 1: a<< b>> c\nd<<e>>\nActivations: " b" 2, "e" 5'


def test_neighbouring_marked_tokens_stand_between_one_pair_of_marks():
    assert marked_text(["a", "b", "c", "d"], [True, True, False, True]) == "<<ab>>c<<d>>"


@pytest.mark.parametrize(
    "answer, label",
    [
        ("LABEL: the word 'is'", "the word 'is"),
        ("I think.\n**Label:** numbers\n", "numbers"),
        ("LABEL: first\nLABEL: second", "second"),
        ("just words", "just words"),
        ("  \n", None),
        ("LABEL:", None),
        ("LABEL: " + "x" * 300, "x" * 200),
    ],
)
def test_the_label_of_an_answer_is_its_last_labelled_line(answer: str, label: str | None):
    assert read_label(answer) == label


@pytest.mark.parametrize(
    "answer, decisions",
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Excerpts [1] and [3] fit: [1,0,1].", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("yes", None),
    ],
)
def test_decisions_are_read_only_where_there_is_one_for_each_excerpt(answer: str, decisions: list[bool] | None):
    assert read_decisions(answer, 3) == decisions


def test_balanced_accuracy_weighs_both_kinds_alike():
    assert Score(asked=10, hits=3, active=4, false_alarms=3).balanced_accuracy == pytest.approx((3 / 4 + 3 / 6) / 2)
    assert Score(asked=4, hits=4, active=4, false_alarms=0).balanced_accuracy is None


@pytest.mark.parametrize("apart", [False, True])
def test_silent_windows_are_all_windows_without_an_activation_and_no_others(apart: bool):
    rng = np.random.default_rng(0)
    places = np.sort(rng.choice(6 * 20, 14, replace=False)).astype(np.int32)
    documents = np.cumsum(rng.random((6, 20)) < 0.15, axis=1).astype(np.int32)
    found = Activations(
        first=0, tokens=np.arange(120, dtype=np.int32).reshape(6, 20), documents=documents, apart=apart,
        strata=("all",), stratum=np.zeros(120, np.uint8), starts=np.array([0, 0, 14]), places=places,
        values=np.ones(14, np.float32),
    )  # fmt: skip
    silent = set()
    for sequence in range(6):
        for offset in range(20 - 5 + 1):
            window = found.tokens[sequence, offset : offset + 5]
            if apart:
                same = documents[sequence, offset : offset + 5] == documents[sequence, offset]
                window = window[same]
            if len(window) > 2 and not set(window.tolist()) & set(places.tolist()):
                silent.add(tuple(window.tolist()))
    drawn = {tuple(one.tolist()) for one in silent_windows(found, 1, 5, 500, seed=3)}
    assert drawn == silent
    assert len(list(silent_windows(found, 1, 5, 4, seed=3))) == 4


def test_wrong_marks_are_as_many_as_asked_for_and_drawn_by_the_key():
    excerpts = [Excerpt(["x"] * 12, [0.0] * 12)] * 3
    marks = wrong_marks(excerpts, 2, 0, "marks", 5)
    assert [sum(one) for one in marks] == [2, 2, 2]
    assert marks[0] != marks[1]
    assert marks == wrong_marks(excerpts, 2, 0, "marks", 5)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    with Chat() as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{chat.address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(server_module, "_RETRIES", 0)
        yield chat


@pytest.fixture
def run(trained_on_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_on_text, tmp_path / "run"))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def explained(command: Command, run: Path, *options: object) -> Outcome:
    return command("explain", run, "--model", "small", "--parallel", 1, *options)


def test_labels_are_kept_with_scores_that_follow_from_the_answers(command: Command, run: Path, chat: Chat):
    done = explained(command, run, "--count", 3)
    assert done.code == 0, done.err
    assert done.path == run / FILE
    head, *found = lines(run)
    assert (head["model"], head["temperature"], head["step"]) == ("small", 0.0, 6)
    assert len(found) == 3
    asked = [one for one in chat.asked if "LABEL:" in one["messages"][0]["content"]]
    assert len(asked) == 3
    assert all(one["model"] == "small" and one["temperature"] == 0 for one in chat.asked)
    assert sum(one["tokens"] for one in found) == TOKENS * len(chat.asked)
    for one in found:
        assert one["label"].startswith('the token "')
        assert one["fuzzing"]["hits"] <= one["fuzzing"]["active"] < one["fuzzing"]["asked"]

    chat.asked.clear()
    again = explained(command, run, "--count", 3, "--json")
    assert chat.asked == []
    told = json.loads(again.out)
    assert told["labels"] == 3
    scores = [one["detection_accuracy"] for one in told["latents"]]
    assert scores == sorted(scores, reverse=True)
    assert told["detection_accuracy"] == pytest.approx(np.mean(scores))


def test_a_latent_is_called_by_people_else_by_the_model(command: Command, run: Path, chat: Chat, tmp_path: Path):
    assert explained(command, run, "--count", 2).code == 0
    head, first, second = lines(run)
    (tmp_path / "mine.csv").write_text(f"latent,label\n{first['latent']},mine\n")
    merge_labels(run, head["step"], 64, tmp_path / "mine.csv")
    assert names_of_latents(run, head["step"], head["store"]) == {
        first["latent"]: "mine", second["latent"]: second["label"]
    }  # fmt: skip
    assert names_of_latents(run, head["step"] + 1, head["store"]) == {first["latent"]: "mine"}


def test_a_model_that_says_yes_to_everything_scores_a_half(command: Command, run: Path, chat: Chat):
    chat.always = "[1, 1, 1, 1, 1]"
    done = explained(command, run, "--count", 1, "--json")
    (one,) = json.loads(done.out)["latents"]
    assert one["detection"]["hits"] == one["detection"]["active"]
    assert one["detection"]["false_alarms"] == one["detection"]["asked"] - one["detection"]["active"]
    assert one["detection_accuracy"] == one["fuzzing_accuracy"] == 0.5


def test_what_is_done_is_kept_and_the_rest_asked_by_the_next_call(command: Command, run: Path, chat: Chat):
    whole = explained(command, run, "--count", 3)
    assert whole.code == 0
    wanted, needed = lines(run), len(chat.asked)
    (run / FILE).unlink()
    chat.asked.clear()

    chat.refuse_after = needed // 2
    stopped = explained(command, run, "--count", 3)
    assert stopped.code == 2
    assert "the model is not loaded" in stopped.err
    kept = lines(run)
    assert 1 < len(kept) < 4
    (run / FILE).write_text((run / FILE).read_text() + '{"latent": 1, "lab')  # as a kill would leave it

    chat.refuse_after = None
    chat.asked.clear()
    done = explained(command, run, "--count", 3)
    assert done.code == 0, done.err
    assert lines(run) == wanted
    assert len(chat.asked) < needed


def test_the_bound_on_tokens_ends_it_resumable(command: Command, run: Path, chat: Chat):
    done = explained(command, run, "--count", 3, "--max-tokens", 3 * TOKENS)
    assert done.code == 3
    assert "--max-tokens 300" in done.err
    assert len(chat.asked) == 3
    assert explained(command, run, "--count", 3).code == 0


def test_a_dry_run_sends_and_writes_nothing(command: Command, run: Path, chat: Chat):
    done = explained(command, run, "--latents", "3,5-6", "--dry-run")
    assert done.code == 0, done.err
    assert "3 latents" in done.err
    assert "Excerpt 1: " in done.out
    assert chat.asked == []
    assert not (run / FILE).exists()


@pytest.mark.parametrize(
    "options, told",
    [
        (("--latents", "3,x"), "'x' is neither a number"),
        (("--latents", "63-70"), "--latents: "),
    ],
)
def test_latents_that_cannot_be_labelled_are_refused(
    command: Command, run: Path, chat: Chat, options: tuple[str, ...], told: str
):
    done = explained(command, run, *options)
    assert done.code == 2
    assert told in done.err
    assert chat.asked == []


def test_labels_of_another_model_are_not_mixed_in(command: Command, run: Path, chat: Chat):
    assert explained(command, run, "--count", 1).code == 0
    done = command("explain", run, "--model", "large", "--count", 1)
    assert done.code == 2
    assert "model small there, large now" in done.err


def test_no_server_and_a_wrong_key_are_told(command: Command, run: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    done = explained(command, run, "--count", 1)
    assert done.code == 2
    assert "set OPENAI_API_KEY" in done.err
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    done = explained(command, run, "--count", 1)
    assert done.code == 2
    assert "OPENAI_BASE_URL" in done.err
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    done = explained(command, run, "--count", 1)
    assert done.code == 3
    assert "run the same command again" in done.err
