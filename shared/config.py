"""Configuration: one frozen model per component, filled from a preset, a file and `--set` overrides.

A field that does not exist is an error, and the message names the nearest one that does.
"""

import difflib
import tomllib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import CorruptData, UserError


class Config(BaseModel):
    """Base of all settings and records: frozen, unknown fields refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


M = TypeVar("M", bound=BaseModel)


def build(cls: type[M], data: Mapping[str, Any], origin: str) -> M:
    """Validate settings given by the user. Raises `UserError` in one line that names field, value and cause."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(cls, error)}") from error


def read_record(cls: type[M], data: Any, path: Path) -> M:
    """Validate a record that this project wrote. Raises `CorruptData`."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise CorruptData(f"{path}: {_explain(cls, error)}") from error


def load_preset(presets: Path, name: str, file: Path | None) -> dict[str, Any]:
    """The settings of a preset (`presets/NAME.toml`), or of `file`, which replaces it."""
    known = sorted(path.stem for path in presets.glob("*.toml"))
    if file is None and name not in known:
        raise UserError(f"no preset {name!r}; presets: {', '.join(known)}{_nearest(name, known)}")
    path = file or presets / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration file at {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from error


def override(settings: dict[str, Any], assignments: Iterable[str], *, variants: Container[str] = ()) -> dict[str, Any]:
    """`settings` with each `a.b=value` put in; values are TOML, and what is not TOML is a string.

    `variants` are groups whose `kind` decides which settings they have: another kind drops those of the kind before.
    """
    result = _copy(settings)
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted.strip():
            raise UserError(f"--set {assignment}: expected NAME=VALUE, for example --set seed=1")
        *parents, last = dotted.strip().split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {assignment}: {parent} is a value, not a group of settings")
        value = _parse(text.strip())
        if last == "kind" and ".".join(parents) in variants and table.get(last) != value:
            table.clear()
        table[last] = value
    return result


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "settings"
    if first["type"] == "extra_forbidden":
        fields = _fields_at(cls, first["loc"][:-1])
        return f"unknown option {where!r}{_nearest(str(first['loc'][-1]), fields)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + ("" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})")


def _fields_at(cls: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = cls.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        cls = field.annotation
    return sorted(cls.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
