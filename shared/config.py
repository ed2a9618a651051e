"""Configuration: one frozen model per component, filled from a preset, a file and `--set` overrides.

A field that does not exist is an error, and the message names the nearest one that does (`shared.check_settings`).
"""

import difflib
import hashlib
import json
import re
import reprlib
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from shared.check_settings import Change, blamed, check_settings
from shared.errors import CorruptData, UserError, warn
from shared.files.untrusted import MOST_NESTED, nests_too_deep, read_file

MOST_CONFIG_BYTES = 2**16
_MOST_DOTS = 1000
"""In a line of TOML: reading a key takes the cube of its parts."""
_MOST_PLACE, _MOST_MESSAGE = 200, 1000
_BRANCH = re.compile(r"constrained-\w+$|literal\[|(int|float|str)$")
"""What names a branch of a union in the place of an error, and no field."""
_PLAIN = {
    "dict_type": "not a table of settings",
    "float_parsing": "not a number",
    "float_type": "not a number",
    "int_from_float": "not a whole number",
    "int_parsing": "not a whole number",
    "int_type": "not a whole number",
    "list_type": "not a list",
    "model_type": "not a group of settings",
    "string_type": "not text",
    "tuple_type": "not a list, such as [1, 2]",
    "union_tag_not_found": "its kind is missing",
}
"""What is wrong, in place of pydantic's words."""
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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Tell the old names in the schema, too."""
        found = handler(schema)
        handler.resolve_ref_schema(found)["renamed"] = cls.renamed
        return found


M = TypeVar("M", bound=BaseModel)


def json_digest(value: Any) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, over a value as canonical JSON: sorted names, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as JSON holds it, with the digest of the rest as its `digest`."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return rest | {"digest": json_digest(rest)}


def build(
    cls: type[M],
    data: Mapping[str, Any],
    origin: str,
    changes: Sequence[Change] = (),
    aliases: Mapping[str, str] | None = None,
) -> M:
    """Validate settings given by the user. Raises `UserError` in one line that names field, value and cause.

    `changes`: those that `data` has beside what `origin` holds; the message begins with the one that is to blame.
    `aliases` as in `check_settings`. A setting by an old name is taken, with a warning.
    """
    check_settings(cls.model_json_schema(), data, origin, changes, aliases)
    notes: list[str] = []
    try:
        found = cls.model_validate(data, context=notes)
    except ValidationError as error:
        raise UserError(_blame(cls, error, origin, changes)) from error
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
        meant = f"; a setting is given with --set {name}" if "=" in name else _nearest(name, known)
        raise UserError(f"no preset {name!r}; presets: {', '.join(known)}{meant}")
    path = file or presets / f"{name}.toml"
    try:
        return _toml(read_file(path, MOST_CONFIG_BYTES, follow=True).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration file at {path}") from error
    except (ValueError, OSError, CorruptData) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error


Changes = Mapping[str, object] | Iterable[str | Change]
"""Values by dotted name, or lines of `a.b=value`, whose value is TOML, or text where it is none."""


def changes_of(changes: Changes) -> list[Change]:
    """List changes of settings, each with the words in which it was given. Raises `UserError` on what is none."""
    if isinstance(changes, str):
        raise UserError(f"changes of settings are a list of NAME=VALUE or a dictionary, got the text {brief(changes)}")
    if isinstance(changes, Mapping):
        return [Change(_one_line(f"{name} = {brief(value)}"), name, value) for name, value in changes.items()]
    return [one if isinstance(one, Change) else _assigned(one) for one in changes]


def override(settings: dict[str, Any], changes: Changes, *, variants: Container[str] = ()) -> dict[str, Any]:
    """Return `settings` with changes put in.

    `variants` are groups whose `kind` decides which settings they have: another kind drops those of the kind before
    from `settings`, and no change, whichever comes first.
    """
    result = _copy(settings)
    made = sorted(changes_of(changes), key=lambda one: one.name.removesuffix(".kind") not in variants)
    for said, name, value in made:
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"{said}: {_one_line(parent[:80])} is a value, not a group of settings")
        if last == "kind" and ".".join(parents) in variants and table.get(last) != value:
            table.clear()
        table[last] = value
    return result


def _assigned(assignment: str) -> Change:
    """Return the change that a line says."""
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {_one_line(assignment[:_MOST_PLACE])}: expected NAME=VALUE, for example --set seed=1")
    if name.count(".") > MOST_NESTED:
        raise UserError(f"--set {_one_line(assignment[:80])}...: more than {MOST_NESTED} groups within each other")
    return Change(f"--set {_one_line(assignment[:_MOST_PLACE])}", name.strip(), _parse(text.strip(), assignment))


def dotted(tables: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested tables with their dotted names, such as `("optimizer.lr", 0.004)`."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


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


def _blame(cls: type[BaseModel], error: ValidationError, origin: str, changes: Sequence[Change]) -> str:
    """Return what is wrong, after what the user gave that is to blame: one change, any of them, or none."""
    where, said = _place(cls, first := _first(error)), _said(first)
    change = blamed(where, changes) if where else None
    if change:
        return f"{change.said}: {said}" if change.name == where else f"{change.said}: {where}: {said}"
    if changes and not where:  # how several go together
        origin = f"{origin} with {' '.join(one.said for one in changes)}"
    return f"{origin}: {where or 'settings'}: {said}"


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    where, first = _place(cls, detail := _first(error)) or "settings", detail
    return f"unknown option {where!r}" if first["type"] == "extra_forbidden" else f"{where}: {_said(first)}"


def _first(error: ValidationError) -> ErrorDetails:
    return error.errors(include_url=False)[0]


def _place(cls: type[BaseModel], detail: ErrorDetails) -> str:
    """Return the dotted name of the setting that an error is about; empty where it is about all together."""
    parts = _without_kinds(cls, [str(part) for part in detail["loc"] if not _BRANCH.match(str(part))])
    return _one_line(".".join(parts)[:_MOST_PLACE])


def _said(detail: ErrorDetails) -> str:
    """Say in plain words what is wrong with a value."""
    kind, message = detail["type"], _one_line(detail["msg"].removeprefix("Value error, "))
    if kind == "missing":
        return "it is missing"
    if kind == "value_error":
        return message
    if kind == "too_short":
        least = detail["ctx"]["min_length"]
        return f"must have at least {least} item{'s' * (least != 1)}"
    if kind == "string_pattern_mismatch":
        message = f"must have the form {detail['ctx']['pattern']}"
    return f"{_PLAIN.get(kind, message)} (got {brief(detail['input'])})"


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


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field can hold: one for a group of settings, several for one with kinds, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name[:80], known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
