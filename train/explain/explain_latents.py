"""Asks a language model for labels of latents, and scores each label by detection and fuzzing."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from numpy.typing import NDArray

from shared.console.progress import Progress
from shared.console.signals import stop_signals
from shared.errors import ProjectError, Stopped, UserError
from shared.keyed import permutation
from train.explain.excerpts import LEAST, Excerpts, LatentExcerpts, wrong_marks
from train.explain.explanation_record import Asked, Explanation, Score, append, begin
from train.explain.questions import (
    Excerpt,
    ask_detection,
    ask_fuzzing,
    ask_label,
    read_decisions,
    read_label,
)
from train.explain.server import Question, Server
from train.interchange.sampled import sampled
from train.run.load_run import LoadedRun

Array = NDArray[Any]

LATENTS = 100
"""That are labelled, if the user does not say which."""
_TOGETHER = 5
"""Excerpts of a question, as in delphi."""
_AGAIN = "stopped; run the same command again to go on"


class Scope(NamedTuple):
    """Which latents are labelled."""

    latents: Sequence[int] | None
    """These; none: `most` of those with contexts enough, drawn by a keyed hash."""
    most: int
    seed: int


class Plan(NamedTuple):
    """What would be sent."""

    latents: list[int]
    """Those that have no label yet."""
    questions: int
    characters: int
    """Of the questions, without the labels in them."""
    first: Question | None
    """The first that would be asked; none: nothing is left to ask."""


class Labelled(NamedTuple):
    """What is known in the end."""

    explanations: dict[int, Explanation]
    unread: list[int]
    """Latents for which no answer held a label."""


def plan(loaded: LoadedRun, scope: Scope, done: Iterable[int]) -> tuple[Plan, Excerpts]:
    """Choose latents and count what asking about them takes; sends nothing.

    Raises `UserError` when a latent has too few contexts, or the run has no samples.
    """
    found = sampled(loaded)
    excerpts = Excerpts(found, loaded.rows.store.path / "tokenizer" / "tokenizer.json", scope.seed)
    latents = [latent for latent in _chosen(excerpts.latents(), scope) if latent not in set(done)]
    some = [_questions_of(excerpts.of(latent), scope.seed) for latent in latents[:20]]
    each = fmean(map(len, some)) if some else 0
    size = fmean(sum(len(one.system) + len(one.user) for one in asked) for asked in some) if some else 0
    first = some[0][0] if some else None
    return Plan(latents, math.ceil(each * len(latents)), math.ceil(size * len(latents)), first), excerpts


def _chosen(enough: Array, scope: Scope) -> list[int]:
    if scope.latents is not None:
        if few := sorted(set(scope.latents) - set(enough.tolist())):
            raise UserError(f"--latents: {few[0]} has fewer than {LEAST} contexts in the run's samples; leave it out")
        return sorted(set(scope.latents))
    order = permutation(len(enough), scope.seed, "latents to explain")
    return sorted(enough[order[: scope.most]].tolist())


def explain_latents(
    run: Path, asked: Asked, server: Server, excerpts: Excerpts, latents: Sequence[int], parallel: int
) -> Labelled:
    """Label `latents`, `parallel` at a time; each is kept when it is done. `asked` begins the file.

    Raises `Stopped` when a signal came, the bound on tokens is reached or the server is out of reach: what is done is
    kept, and what was under way is asked again by the next call. Raises `UserError` when the server refuses.
    """
    done, unread = begin(run, asked), list[int]()
    waiting = [latent for latent in latents if latent not in done]
    with (
        stop_signals() as stop,
        Progress("explain", len(waiting), "latents") as progress,
        ThreadPoolExecutor(parallel) as pool,
    ):
        started = [pool.submit(_explain, server, excerpts, latent, asked.seed, stop) for latent in waiting]
        try:
            for ready, future in enumerate(as_completed(started), 1):
                latent, found = future.result()
                if found:
                    append(run, found)
                    done[latent] = found
                else:
                    unread.append(latent)
                progress.update(ready, f"{server.used:,} tokens used")
        except ProjectError:
            stop.append(0)  # what waits, or runs beside it, asks no more
            raise
    return Labelled(done, sorted(unread))


def _explain(
    server: Server, excerpts: Excerpts, latent: int, seed: int, stop: Sequence[object]
) -> tuple[int, Explanation | None]:
    """Ask for one label, and for decisions about it; none when the answer holds no label."""
    used = []

    def ask(question: Question) -> str:
        if stop:
            raise Stopped(_AGAIN)
        answer = server.ask(question)
        used.append(answer.tokens)
        return answer.text

    questions = _Questions(excerpts.of(latent), seed)
    label = read_label(ask(questions.label()))
    if label is None:
        return latent, None
    detection = _score(questions.detection, label, ask)
    fuzzing = _score(questions.fuzzing, label, ask)
    return latent, Explanation(latent=latent, label=label, detection=detection, fuzzing=fuzzing, tokens=sum(used))


class _Batch(NamedTuple):
    """Excerpts of one question."""

    excerpts: list[Excerpt]
    marks: list[list[bool]]
    right: list[bool]
    """Which of them the answer should take."""


class _Questions:
    """The questions about one latent."""

    def __init__(self, found: LatentExcerpts, seed: int) -> None:
        self._found = found
        count = math.ceil(fmean(sum(one.marked) for one in found.active))
        marks = [one.marked for one in found.active] + wrong_marks(found.silent, count, seed, "marks", found.latent)
        both = [*found.active, *found.silent]
        order = permutation(len(both), seed, "order of excerpts", found.latent).tolist()
        self.batches = [
            _Batch([both[i] for i in part], [marks[i] for i in part], [i < len(found.active) for i in part])
            for part in (order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER))
        ]

    def label(self) -> Question:
        largest = max(max(one.activations) for one in [*self._found.shown, *self._found.active])
        return ask_label(self._found.shown, largest)

    def detection(self, label: str) -> list[tuple[Question, list[bool]]]:
        return [(ask_detection(label, batch.excerpts), batch.right) for batch in self.batches]

    def fuzzing(self, label: str) -> list[tuple[Question, list[bool]]]:
        return [(ask_fuzzing(label, batch.excerpts, batch.marks), batch.right) for batch in self.batches]


def _score(
    questions: Callable[[str], list[tuple[Question, list[bool]]]], label: str, ask: Callable[[Question], str]
) -> Score:
    asked = hits = active = false_alarms = 0
    for question, right in questions(label):
        decisions = read_decisions(ask(question), len(right))
        if decisions is None:
            continue
        asked += len(right)
        active += sum(right)
        hits += sum(one and wanted for one, wanted in zip(decisions, right, strict=True))
        false_alarms += sum(one and not wanted for one, wanted in zip(decisions, right, strict=True))
    return Score(asked=asked, hits=hits, active=active, false_alarms=false_alarms)


def _questions_of(found: LatentExcerpts, seed: int) -> list[Question]:
    asked = _Questions(found, seed)
    return [asked.label(), *(one for one, _ in asked.detection("")), *(one for one, _ in asked.fuzzing(""))]
