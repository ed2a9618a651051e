"""Configuration: one frozen model per component, filled from a preset, a file and `--set` overrides.

A field that does not exist is an error, and the message names the nearest one that does.
"""

import difflib
import hashlib
import json
import re
import reprlib
import tomllib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from shared.errors import CorruptData, UserError, warn
from shared.files.untrusted import MOST_NESTED, nests_too_deep, read_file

MOST_CONFIG_BYTES = 2**16
_MOST_DOTS = 1000
"""In a line of TOML: reading a key takes the cube of its parts."""
_MOST_PLACE, _MOST_MESSAGE = 200, 1000
_BRANCH = re.compile(r"constrained-\w+$|literal\[|(int|float|str)$")
"""What names a branch of a union in the place of an error, and no field."""
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120
_brief.maxlist = _brief.maxtuple = 40


class Config(BaseModel):
    """Base of all settings and records: frozen, unknown fields refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class GrownConfig(Config):
    """A record that later versions gave more fields. At their defaults they are left out: it is written as before."""

    later: ClassVar[tuple[str, ...]]
    """Names of these fields."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in serialize(self).items()
            if name not in self.later or value != fields[name].default
        }


class RenamedConfig(Config):
    """Settings of which some had other names in the version before: both names are read."""

    renamed: ClassVar[dict[str, str]]
    """The old names, and those of now."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping):
            return data
        old = {name: now for name, now in cls.renamed.items() if name in data and now not in data}
        notes: Any = info.context
        if isinstance(notes, list):
            notes += [f"{name} is now called {now}" for name, now in old.items()]
        return {old.get(name, name): value for name, value in data.items()}


M = TypeVar("M", bound=BaseModel)


def json_digest(value: Any) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, over a value as canonical JSON: sorted names, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as JSON holds it, with the digest of the rest as its `digest`."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return rest | {"digest": json_digest(rest)}


def build(cls: type[M], data: Mapping[str, Any], origin: str) -> M:
    """Validate settings given by the user. Raises `UserError` in one line that names field, value and cause.

    A setting by an old name is taken, with a warning.
    """
    notes: list[str] = []
    try:
        found = cls.model_validate(data, context=notes)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(cls, error)}") from error
    for note in notes:
        warn(f"{origin}: {note}; the old name will be refused in the next version")
    return found


def read_record(cls: type[M], data: Any, path: Path) -> M:
    """Validate a record that this project wrote. Raises `CorruptData`."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise CorruptData(f"{path}: {_explain(cls, error)}") from error


def load_preset(presets: Path, name: str, file: Path | None) -> dict[str, Any]:
    """Return the settings of a preset (`presets/NAME.toml`), or of `file`, which replaces it."""
    known = sorted(path.stem for path in presets.glob("*.toml"))
    if file is None and name not in known:
        raise UserError(f"no preset {name!r}; presets: {', '.join(known)}{_nearest(name, known)}")
    path = file or presets / f"{name}.toml"
    try:
        return _toml(read_file(path, MOST_CONFIG_BYTES, follow=True).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration file at {path}") from error
    except (ValueError, OSError, CorruptData) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error


def override(
    settings: dict[str, Any], changes: Mapping[str, object] | Iterable[str], *, variants: Container[str] = ()
) -> dict[str, Any]:
    """Return `settings` with changes put in: values by dotted name, or lines of `a.b=value`.

    The value of a line is TOML, and what is not TOML is a string. `variants` are groups whose `kind` decides which
    settings they have: another kind drops those of the kind before.
    """
    if isinstance(changes, str):
        raise UserError(f"changes of settings are a list of NAME=VALUE or a dictionary, got the text {brief(changes)}")
    given = changes.items() if isinstance(changes, Mapping) else map(_assigned, changes)
    result = _copy(settings)
    for dotted, value in given:
        *parents, last = dotted.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                shown = _one_line(f"{dotted}={value}"[:_MOST_PLACE])
                raise UserError(f"--set {shown}: {_one_line(parent[:80])} is a value, not a group of settings")
        if last == "kind" and ".".join(parents) in variants and table.get(last) != value:
            table.clear()
        table[last] = value
    return result


def _assigned(assignment: str) -> tuple[str, Any]:
    """Return the dotted name and the value of a line."""
    dotted, equals, text = assignment.partition("=")
    if not equals or not dotted.strip():
        raise UserError(f"--set {_one_line(assignment[:_MOST_PLACE])}: expected NAME=VALUE, for example --set seed=1")
    if dotted.count(".") > MOST_NESTED:
        raise UserError(f"--set {_one_line(assignment[:80])}...: more than {MOST_NESTED} groups within each other")
    return dotted.strip(), _parse(text.strip(), assignment)


def brief(value: Any) -> str:
    """Return a value as text for an error message, in one line and cut where it is long."""
    try:
        return _brief.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a value too long to show"


def _parse(text: str, assignment: str) -> Any:
    try:
        return _toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise UserError(f"--set {_one_line(assignment[:80])}...: {error}") from error


def _toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises `ValueError` on what is none, or is made to take for ever."""
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"a line with more than {_MOST_DOTS} dots")
    try:
        found = tomllib.loads(text)
    except RecursionError:
        found = None
    if found is None or nests_too_deep(found):
        raise ValueError(f"nested more than {MOST_NESTED} deep")
    return found


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    parts = _without_kinds(cls, [str(part) for part in first["loc"] if not _BRANCH.match(str(part))])
    where = _one_line(".".join(parts)[:_MOST_PLACE] or "settings")
    if first["type"] == "extra_forbidden":
        return f"unknown option {where!r}{_nearest_setting(cls, parts)}"
    message = _one_line(first["msg"].removeprefix("Value error, "))
    known = first["type"] in ("missing", "value_error")
    return f"{where}: {message}" + ("" if known else f" (got {brief(first['input'])})")


def _one_line(text: str) -> str:
    """Return `text` as it may be printed: without control characters, and cut where it is long."""
    cut = text if len(text) <= _MOST_MESSAGE else f"{text[:_MOST_MESSAGE]}..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def _without_kinds(cls: type[BaseModel], parts: list[str]) -> list[str]:
    """Return a place without the names of the kinds that groups with kinds have."""
    if not parts or parts[0] not in cls.model_fields:
        return parts
    head, *rest = parts
    models = models_in(cls.model_fields[head].annotation)
    if len(models) > 1:
        models = [model for model in models if rest and model.model_fields["kind"].default == rest[0]]
        rest = rest[1:] if models else rest
    return [head, *(_without_kinds(models[0], rest) if models else rest)]


def _nearest_setting(cls: type[BaseModel], parts: list[str]) -> str:
    """Name the setting that was meant: one whose last part, or whose whole name, is nearly what was given."""
    if not parts:
        return ""
    known, given = names_of(cls), ".".join(parts)[:_MOST_PLACE]
    if given in known:
        return f"; it is a setting of another {parts[0]}.kind"
    *group, last = parts
    inside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == ".".join(group)]
    if near := difflib.get_close_matches(last[:80], inside, n=1):
        return f"; did you mean {'.'.join([*group, *near])!r}?"
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    return _nearest(given, [*known, *sorted({name.partition(".")[0] for name in known})])


def names_of(cls: type[BaseModel]) -> list[str]:
    """List the dotted names of all settings of a class, those of every kind of a group with kinds included."""
    found: dict[str, None] = {}
    for name, field in cls.model_fields.items():
        groups = models_in(field.annotation)
        found |= dict.fromkeys(f"{name}.{inner}" for group in groups for inner in names_of(group))
        found |= {} if groups else {name: None}
    return list(found)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field can hold: one for a group of settings, several for one with kinds, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name[:80], known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
