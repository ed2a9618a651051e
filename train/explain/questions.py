"""What a language model is asked about a latent, and what its answers mean.

The three questions are those of Paulo et al. 2024 (arXiv:2410.13928), as in delphi: a label from marked contexts;
*detection*: which contexts does the label describe; *fuzzing*: in which are the right tokens marked.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from train.explain.server import Question

_LEFT, _RIGHT = "<<", ">>"
_MARKED = 0.3
"""Share of a context's largest activation above which a token is marked, as in delphi."""
_MOST_LABEL = 200
"""Characters."""

_LABEL = f"""\
You study one latent of a sparse model of text. You are given excerpts in which it is active. The tokens on which it \
is active stand between {_LEFT} and {_RIGHT}; after each excerpt they are listed with their activation, from 1 to 10.
Find what the marked tokens, and what stands before them, have in common. Answer with a label of at most 20 words on \
one line, which begins with "LABEL:". Be specific. Do not mention the marks, and do not list several guesses."""

_DETECTION = """\
You are given a label of a latent of a sparse model of text, and numbered excerpts. Decide for each whether it holds \
what the label describes. Answer with a JSON list of one number per excerpt, in order: 1 if it does, 0 if not. Answer \
with the list alone, such as [0, 1, 1]."""

_FUZZING = f"""\
You are given a label of a latent of a sparse model of text, and numbered excerpts in which some tokens stand between \
{_LEFT} and {_RIGHT}. Decide for each whether the marked tokens are those that the label describes. Answer with a JSON \
list of one number per excerpt, in order: 1 if they are, 0 if not. Answer with the list alone, such as [0, 1, 1]."""


class Excerpt(NamedTuple):
    """Tokens in order, and the latent's activation at each; 0 where it is not active or not known."""

    text: list[str]
    activations: list[float]

    @property
    def marked(self) -> list[bool]:
        """Which tokens are marked: those above a share of the largest activation."""
        limit = _MARKED * max(self.activations, default=0)
        return [value > limit for value in self.activations]


def ask_label(excerpts: Sequence[Excerpt], largest: float) -> Question:
    """Ask for a label; `largest` is the activation that counts as 10."""
    shown = []
    for number, excerpt in enumerate(excerpts, 1):
        tokens = zip(excerpt.text, excerpt.activations, excerpt.marked, strict=True)
        told = [
            f"{json.dumps(token, ensure_ascii=False)} {_of_ten(value, largest)}" for token, value, on in tokens if on
        ]
        shown.append(f"Excerpt {number}: {marked_text(excerpt.text, excerpt.marked)}\nActivations: {', '.join(told)}")
    return Question(_LABEL, "\n\n".join(shown))


def ask_detection(label: str, excerpts: Sequence[Excerpt]) -> Question:
    """Ask which excerpts a label describes."""
    return Question(_DETECTION, _numbered(label, ["".join(excerpt.text) for excerpt in excerpts]))


def ask_fuzzing(label: str, excerpts: Sequence[Excerpt], marks: Sequence[Sequence[bool]]) -> Question:
    """Ask in which excerpts the marked tokens are those that a label describes."""
    texts = [marked_text(excerpt.text, on) for excerpt, on in zip(excerpts, marks, strict=True)]
    return Question(_FUZZING, _numbered(label, texts))


def read_label(answer: str) -> str | None:
    """Return the last line of an answer that begins with LABEL:, else its last line; none of an empty answer."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    labelled = [line for line in lines if re.match(r"\W*label\W*:", line, re.IGNORECASE)]
    if not lines:
        return None
    text = re.sub(r"^\W*label\W*:", "", (labelled or lines)[-1], flags=re.IGNORECASE).strip(" *\"'`")
    return " ".join(text.split())[:_MOST_LABEL] or None


def read_decisions(answer: str, count: int) -> list[bool] | None:
    """Return the decisions of an answer; none when it holds no list of `count` numbers 0 or 1."""
    for found in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        values = re.findall(r"[^\s,\[\]]+", found)
        if len(values) == count and set(values) <= {"0", "1"}:
            return [value == "1" for value in values]
    return None


def marked_text(text: Sequence[str], marked: Sequence[bool]) -> str:
    """Return the text, each stretch of marked tokens between marks."""
    parts, before = [], False
    for token, on in zip(text, marked, strict=True):
        parts += [_LEFT if on else _RIGHT] if on != before else []
        parts.append(token)
        before = on
    return "".join([*parts, _RIGHT if before else ""])


def _numbered(label: str, texts: Sequence[str]) -> str:
    return "\n\n".join([f"Label: {label}", *(f"Excerpt {number}: {text}" for number, text in enumerate(texts, 1))])


def _of_ten(value: float, largest: float) -> int:
    return max(1, min(10, round(10 * value / largest)))
