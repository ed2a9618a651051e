"""Labels of the characters of Python source, on windows that may begin anywhere in a file.

Pygments' lexer, and not the standard library's `tokenize`: that refuses what a window is made of (brackets and strings
that were opened before it), and takes f-strings apart only since Python 3.12.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, Punctuation, String, _TokenType

Array = NDArray[Any]
Piece = tuple[int, _TokenType, str]
"""Where it begins, its type, its text."""
Mark = Callable[[str, int, int], None]
"""Gives a label to a range of characters."""

_QUOTES = ("tdqs", "tsqs", "dqs", "sqs")
"""The lexer's states inside of strings: in three double or single quotes, in one."""
CODE_LINE = re.compile(
    r"^\s*(def \w+\(.*|class \w+.*:|return\b.*|import \w[\w.]*|from [\w.]+ import .*|(if|elif|for|while|with|try|except"
    r"|else)\b.*:|[\w.\[\]]+ [+-]?= \S.*|[\w.]+\(.*\)|@\w[\w.]*|raise \w+.*|assert .+|pass|break|continue)$"
)
"""A line that is rarely anything but Python."""
_INDENT, _DEEPEST_INDENT, _DEEPEST_BRACKET = 4, 4, 3
_KINDS: tuple[tuple[str, tuple[_TokenType, ...]], ...] = (
    ("in a string or comment", (String, Comment)),
    ("comment", (Comment,)),
    ("string", (String,)),
    ("docstring", (String.Doc,)),
    ("escape in a string", (String.Escape,)),
    ("field of a string", (String.Interpol,)),
    ("prefix of a string", (String.Affix,)),
    ("number", (Number,)),
    ("keyword", (Keyword, Operator.Word)),
    ("constant (None, True, False)", (Keyword.Constant,)),
    ("name", (Name,)),
    ("builtin", (Name.Builtin,)),
    ("self or cls", (Name.Builtin.Pseudo,)),
    ("exception", (Name.Exception,)),
    ("name of a function being defined", (Name.Function,)),
    ("name of a class being defined", (Name.Class,)),
    ("decorator", (Name.Decorator,)),
    ("module in an import", (Name.Namespace,)),
    ("dunder name", (Name.Function.Magic,)),
    ("operator", (Operator,)),
    ("punctuation", (Punctuation,)),
)
_LEXER = PythonLexer(stripnl=False, ensurenl=False)


def python_labels(text: str) -> dict[str, Array]:
    """Return for each label the characters of `text` that have it, as [n] bool.

    The window may begin within a string or comment: of all ways in which it can, the most plausible is taken. Brackets
    that were opened before it count where it closes them. A line's indentation is that of its statement's first.
    """
    found: dict[str, Array] = {}

    def mark(label: str, low: int, high: int) -> None:
        if label not in found:
            found[label] = np.zeros(len(text), bool)
        found[label][low:high] = True

    pieces = [piece for piece in lexed(text) if piece[2]]
    for at, kind, value in pieces:
        labels = _of_type(kind)
        if "keyword" in labels:
            labels = (*labels, f"keyword {value.strip()}")
        elif {"operator", "punctuation"} & set(labels):
            labels = (*labels, f"sign {value.strip()}")
        for label in labels:
            mark(label, at, at + len(value))
    _attributes_and_calls(pieces, mark)
    _brackets_and_indents(text, pieces, mark)
    return found


def lexed(text: str) -> list[Piece]:
    """Return the pieces of `text` under its most plausible beginning."""
    best: list[Piece] = []
    least = np.inf
    for pieces in _ways(text):
        if (odd := _oddness(pieces)) < least:
            best, least = pieces, odd
        if least < 1:
            break
    return best


def _ways(text: str) -> Iterator[list[Piece]]:
    """Yield the pieces of `text` under each way in which it can begin, the most frequent first."""
    yield list(_LEXER.get_tokens_unprocessed(text))
    first = text.partition("\n")[0]
    rest = _LEXER.get_tokens_unprocessed(text[len(first) :])
    yield [(0, Comment.Single, first), *((at + len(first), kind, value) for at, kind, value in rest)]
    for quotes in _QUOTES:
        yield list(_LEXER.get_tokens_unprocessed(text, stack=("root", quotes)))


def code_share(lines: list[str]) -> float:
    """Return the share of lines, of those that are not blank, that are rarely anything but Python."""
    there = [line for line in lines if line.strip()]
    return sum(bool(CODE_LINE.match(line)) for line in there) / max(len(there), 1)


def _oddness(pieces: list[Piece]) -> float:
    """Count what is odd: names side by side in code, and lines of code in strings; half, for beginning in a string."""
    odd, before, string = 0.0, None, []
    for _, kind, value in pieces:
        if kind in String or kind in Comment:
            string.append(value)
            before = None if kind in String.Affix else kind
            continue
        odd += _code_lines("".join(string))
        string = []
        if not value.strip():
            before = None if "\n" in value else before
            continue
        word = kind in Name or kind in Number or (kind in Keyword and kind in Keyword.Constant)
        odd += kind in Error or (word and before is not None and (before in Name or before in Number))
        odd += word and before is not None and before in String
        before = kind
    return odd + _code_lines("".join(string)) + (0.5 if pieces and pieces[0][1] in String else 0)


def _code_lines(text: str) -> int:
    return sum(bool(CODE_LINE.match(line)) for line in text.split("\n")[1:-1])


@lru_cache
def _of_type(kind: _TokenType) -> tuple[str, ...]:
    return tuple(label for label, types in _KINDS if any(kind in one for one in types))


def _attributes_and_calls(pieces: list[Piece], mark: Mark) -> None:
    """Mark names after a dot, names before an opening bracket, and names before a single `=` in brackets."""
    code = [piece for piece in pieces if piece[2].strip()]
    for before, (at, kind, value), after in zip([None, *code], code, [*code[1:], None], strict=False):
        if kind not in Name:
            continue
        if before and before[2] == ".":
            mark("attribute", at, at + len(value))
        if after and after[2].startswith("("):
            mark("called or defined", at, at + len(value))
        if after and after[2] == "=":
            mark("assigned, or a keyword argument", at, at + len(value))


def _brackets_and_indents(text: str, pieces: list[Piece], mark: Mark) -> None:
    """Mark code by the brackets around it, and everything by the indentation of its statement."""
    quiet = [kind in String or kind in Comment for _, kind, _ in pieces]
    steps = [0 if still else sum(map(value.count, "([{")) - sum(map(value.count, ")]}"))
             for still, (_, _, value) in zip(quiet, pieces, strict=True)]  # fmt: skip
    depths = list(accumulate(steps))
    lowest, level = min([0, *depths]), None  # brackets that were opened before are closed down to the lowest
    for (at, _, value), still, depth in zip(pieces, quiet, depths, strict=True):
        if value.strip():
            if not still and depth > lowest:
                mark(_counted("in", depth - lowest, _DEEPEST_BRACKET, "brackets"), at, at + len(value))
            if level is not None:
                mark(_counted("indented", level, _DEEPEST_INDENT, "levels"), at, at + len(value))
        if "\n" in value and not still and depth <= lowest:
            level = _level(text[at + value.rindex("\n") + 1 :])


def _counted(verb: str, count: int, most: int, what: str) -> str:
    return f"{verb} {count} {what}" if count < most else f"{verb} {most} or more {what}"


def _level(rest: str) -> int | None:
    stripped = rest.lstrip(" ")
    if not stripped or stripped[0] in "\n#":
        return None
    return min((len(rest) - len(stripped)) // _INDENT, _DEEPEST_INDENT)
