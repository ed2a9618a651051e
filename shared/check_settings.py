"""Checks settings against the JSON schema of their class: names, kinds of values, and bounds, in plain words.

A schema can be read from a file, so that a mistake is found before what the settings are of is imported. What a schema
does not say, such as how two settings go together, is left to the class.
"""

import difflib
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from shared.errors import UserError

Schema = Mapping[str, Any]
_PLAIN = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list, such as [1, 2]",
}
_BOUNDS = {
    "minimum": ("at least", lambda value, bound: value >= bound),
    "exclusiveMinimum": ("above", lambda value, bound: value > bound),
    "maximum": ("at most", lambda value, bound: value <= bound),
    "exclusiveMaximum": ("below", lambda value, bound: value < bound),
}
_SHORT = re.compile(r"\d+(\.\d+)?[kmbgt]i?b?", re.IGNORECASE)
_MOST_NAME, _MOST_VALUE, _MOST_LISTED = 200, 120, 30


class Change(NamedTuple):
    """One setting that was given beside a preset or a file."""

    said: str
    """As it was given, for messages: `--set activation.k=16`, `--steps 300`."""
    name: str
    """Dotted."""
    value: Any


class Unfit(UserError):
    """Settings that cannot go together, or not with the store."""

    def __init__(self, said: str, *names: str) -> None:
        """Take what is wrong and the dotted names of the settings that have a part in it."""
        super().__init__(said)
        self.names = names


class _Fault(NamedTuple):
    name: str
    value: Any
    wrong: str


def check_settings(
    schema: Schema,
    settings: object,
    origin: str,
    changes: Sequence[Change] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Raise `UserError` at the first setting that is unknown, or has a value that its schema does not allow.

    `settings`: tables within each other, with `changes` put in. The message begins with the change that is to blame,
    else with `origin`. `aliases`: names that settings have elsewhere, each with a name of ours or a sentence.
    """
    for name, value, wrong in _faults(schema, schema, settings, ()):
        change = blamed(name, changes)
        given = change.name if change and not wrong else name
        wrong = wrong or f"unknown option {given[:_MOST_NAME]!r}{_hint(schema, given, aliases or {})}"
        shown = "" if wrong.startswith("unknown option") or (change and change.name == name) else _shown(name, value)
        raise UserError(f"{change.said if change else origin}: {shown}{wrong}")


@contextmanager
def blaming(changes: Sequence[Change]) -> Iterator[None]:
    """Begin the message of an `Unfit` that is raised inside with those of `changes` that have a part in it."""
    try:
        yield
    except Unfit as error:
        last = [blamed(name, changes) for name in error.names]
        said = [change.said for change in changes if change in last]
        if not said:
            raise
        raise UserError(f"{' '.join(said)}: {error}") from error


def with_defaults(schema: Schema, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked `settings`, with the defaults of their schema where they say nothing."""
    return _filled(schema, schema, settings)


def _filled(root: Schema, schema: Schema, value: Mapping[str, Any]) -> dict[str, Any]:
    node = _resolved(root, schema)
    if kinds := _kinds(node):
        value = {"kind": node["default"]["kind"], **value}
        node = _resolved(root, {"$ref": kinds[value["kind"]]})
    found = {}
    value = {node.get("renamed", {}).get(name, name): one for name, one in value.items()}
    for name, inner in node["properties"].items():
        below = _resolved(root, inner)
        is_group = "properties" in below or bool(_kinds(below))
        if is_group:
            found[name] = _filled(root, inner, value.get(name, {}))
        else:
            found[name] = _as_read(below, value.get(name, inner.get("default")))
    return found


def _as_read(node: Schema, value: Any) -> Any:
    """Return a value as the class reads it: 1e4 is a whole number where one is wanted."""
    kinds = {one.get("type") for one in node.get("anyOf", [node])}
    is_whole = isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds
    return int(value) if is_whole else value


def blamed(name: str, changes: Sequence[Change]) -> Change | None:
    """Return the last change that set `name`, a group that it is in, or a part of it; none if no change did."""
    near = [one for one in changes if f"{name}.".startswith(f"{one.name}.") or f"{one.name}.".startswith(f"{name}.")]
    return near[-1] if near else None


def _shown(name: str, value: object) -> str:
    """Return a setting for a message: in one line, and cut where it is long."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a value too long to show"
    text = f"{name[:_MOST_NAME]} = {text[:_MOST_VALUE]}{'...' if len(text) > _MOST_VALUE else ''}: "
    return text if text.isprintable() else ascii(text)[1:-1]


def _faults(root: Schema, schema: Schema, value: object, path: tuple[str, ...]) -> Iterator[_Fault]:
    """Yield what is wrong; an unknown name has no words for it yet."""
    node = _resolved(root, schema)
    if isinstance(value, Mapping) and (kinds := _kinds(node)):
        kind = value.get("kind")
        if kind is None:
            return
        if not isinstance(kind, str) or kind not in kinds:
            yield _Fault(".".join([*path, "kind"]), kind, f"not one of {', '.join(kinds)}")
            return
        node = _resolved(root, {"$ref": kinds[kind]})
    if not isinstance(value, Mapping) or "properties" not in node:
        if wrong := _wrong(root, node, value, path):
            yield _Fault(".".join(path) or "settings", value, wrong)
        elif isinstance(value, list | tuple):
            items = [one["items"] for one in node.get("anyOf", [node]) if "items" in one]
            for place, one in enumerate(value if items else ()):
                yield from _faults(root, items[0], one, (*path, str(place)))
        return
    for name, inner in value.items():
        now = node.get("renamed", {}).get(name, name)
        known = name if now in value else now
        if known not in node["properties"]:
            further = [str(part) for part in list(inner)[:1]] if isinstance(inner, Mapping) else []
            yield _Fault(".".join([*path, str(name), *further]), inner, "")
        else:
            yield from _faults(root, node["properties"][known], inner, (*path, str(name)))


def _resolved(root: Schema, schema: Schema) -> Schema:
    """Return a schema itself, where another place of `root` holds it."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _kinds(node: Schema) -> Mapping[str, str]:
    return node.get("discriminator", {}).get("mapping", {})


def _wrong(root: Schema, node: Schema, value: object, path: Sequence[str]) -> str:
    """Say what is wrong with a value; nothing where it may do, or where only the class can tell."""
    if ("properties" in node or _kinds(node)) and (value is None or isinstance(value, str | int | float | list)):
        inside = "kind" if _kinds(node) else next(iter(node["properties"]))
        return f"not a group of settings; name one in it, such as {'.'.join([*path, inside])}"
    choices = [_resolved(root, one) for one in node.get("anyOf", [node])]
    if not all(_is_plain(one) for one in choices):
        return ""
    found = [_wrong_value(one, value) for one in choices]
    if not all(found):
        return ""
    bounds = [wrong for wrong in found if wrong.startswith("must")]
    if bounds:
        return bounds[0]
    expected = list(dict.fromkeys(text for one in choices if (text := _expected(one))))
    said = f"not {expected[0]}" if len(expected) == 1 else f"expected {' or '.join(expected)}"
    short = isinstance(value, str) and _SHORT.fullmatch(value) and any(one.get("type") == "integer" for one in choices)
    return f"{said}; settings are written out, such as 10000 or 1e4" if short else said


def _is_plain(node: Schema) -> bool:
    """Tell whether all that a node allows is known here."""
    return "enum" in node or "const" in node or node.get("type") in (*_PLAIN, "null")


def _expected(node: Schema) -> str:
    if values := node.get("enum", [node["const"]] if "const" in node else None):
        return f"{'one of ' if len(values) > 1 else ''}{', '.join(map(str, values))}"
    if node["type"] == "array" and node.get("items", {}).get("type") == "string":
        return 'a list, such as ["a", "b"]'
    return _PLAIN.get(node["type"], "")


def _wrong_value(node: Schema, value: object) -> str:
    if values := node.get("enum", [node["const"]] if "const" in node else None):
        return "" if any(value == one and type(value) is type(one) for one in values) else "another"
    kind = node["type"]
    if kind == "null":
        return "" if value is None else "another"
    if kind == "boolean":
        return "" if isinstance(value, bool) else "another"
    if kind == "string":  # a path may stand for it
        return "" if isinstance(value, str | os.PathLike) else "another"
    if kind == "array":
        return "" if isinstance(value, list | tuple) else "another"
    number = _number(value)
    if isinstance(number, float) and not math.isfinite(number):
        return "must be finite"
    if number is None or (kind == "integer" and number != int(number)):
        return "another"
    for name, (words, fits) in _BOUNDS.items():
        if name in node and not fits(number, node[name]):
            return f"must be {words} {node[name]:,}"
    return ""


def _number(value: object) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def names_in(schema: Schema) -> list[str]:
    """List the dotted names of all settings, those of every kind of a group with kinds included."""
    return list(dict.fromkeys(_names(schema, schema)))


def _names(root: Schema, schema: Schema) -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        node = _resolved(root, inner)
        groups = [_resolved(root, {"$ref": one}) for one in _kinds(node).values()] or [node]
        if all("properties" in one for one in groups):
            yield from (f"{name}.{one}" for group in groups for one in _names(root, group))
        else:
            yield name


def _hint(schema: Schema, given: str, aliases: Mapping[str, str]) -> str:
    """Name the setting that was meant: by another name for it, its last part, or what is near; else list the group."""
    known = names_in(schema)
    group, _, last = given[:_MOST_NAME].lower().rpartition(".")
    if given in known:
        return f"; it is a setting of another {given.partition('.')[0]}.kind"
    if told := aliases.get(given.lower()) or aliases.get(last.replace("-", "_")):
        return f"; did you mean {told!r}?" if told in known else f"; {told}"
    inside = {name.rpartition(".")[2].lower(): name for name in known if name.rpartition(".")[0].lower() == group}
    if near := difflib.get_close_matches(last, inside, n=1):
        return f"; did you mean {inside[near[0]]!r}?"
    if same := [name for name in known if name.rpartition(".")[2].lower() == last]:
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    if not inside and (near := difflib.get_close_matches(given.lower(), known, n=1)):
        return f"; did you mean {near[0]!r}?"
    leaves: dict[str, str] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2].lower(), name)
    if near := difflib.get_close_matches(last, leaves, n=1, cutoff=0.75):
        return f"; did you mean {leaves[near[0]]!r}?"
    return f"; {_listed(known, group)}" if known else ""


def _listed(known: Sequence[str], group: str) -> str:
    """List the settings of a group, or of what stands outside of groups, and the groups."""
    inside = [name for name in known if group and name.lower().startswith(f"{group}.")]
    if not inside:
        inside = [name if "." not in name else f"{name.partition('.')[0]}.…" for name in known]
    names = list(dict.fromkeys(inside))
    more = f", and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"there are {', '.join(names[:_MOST_LISTED])}{more}"
