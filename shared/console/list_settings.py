"""Lists settings: every name, the value that a command would take, the default, what is allowed, and a sentence."""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from shared.config import models_in
from shared.console.terminal import PlainConsole
from shared.errors import printable

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


class Setting(NamedTuple):
    """One setting of a command."""

    name: str
    """As `--set NAME=VALUE` takes it."""
    value: Any
    """What the command would run with."""
    default: Any
    """What it is where neither a preset nor an option sets it."""
    allowed: str
    """The type, its bounds or its choices."""
    told: str
    """What it does, in which unit."""

    @property
    def is_changed(self) -> bool:
        """Whether the value is another than the default."""
        return bool(self.value != self.default)


def list_settings(settings: BaseModel) -> list[Setting]:
    """List all settings within `settings`, groups in the order in which they are declared."""
    return list(_settings(settings, ""))


def show_settings(found: Sequence[Setting], title: str) -> None:
    """Print a table for people; a value that is not the default is marked."""
    table = Table("setting", "value", "default", "what it does, and what it can be", title=title, title_justify="left")
    table.columns[0].no_wrap = True
    table.columns[3].ratio = 1
    group = ""
    for one in found:
        if (head := one.name.rpartition(".")[0]) != group:
            table.add_section()
            group = head
        default = "" if not one.is_changed else "required" if one.default is _REQUIRED else _text(one.default)
        value = Text(printable(_text(one.value)))
        if one.is_changed:
            value.stylize("bold")
            value.append(" *")
        table.add_row(one.name, value, default, f"{one.told} ({one.allowed})")
    console = PlainConsole()
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    console.print("* not the default: set by the preset, the file or an option, or chosen for the store.")


def settings_as_json(found: Sequence[Setting]) -> str:
    """Return the list as JSON."""
    required = {"default": None, "required": True}
    rows = [one._asdict() | (required if one.default is _REQUIRED else {"required": False}) for one in found]
    return json.dumps(rows, indent=2, default=str)


_REQUIRED = object()


def _settings(settings: BaseModel, prefix: str) -> Iterator[Setting]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            models = models_in(field.annotation)
            kinds = [one.model_fields["kind"].default for one in models] if len(models) > 1 else []
            for inner in _settings(value, f"{prefix}{name}."):
                yield inner._replace(allowed=" or ".join(kinds)) if kinds and inner.name.endswith(".kind") else inner
            continue
        default = _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        allowed = _allowed(field)
        told = " ".join((field.description or "Which of the kinds; each has settings of its own.").split())
        yield Setting(f"{prefix}{name}", _plain(value), _plain(default), allowed, told.replace("`", ""))


def _allowed(field: FieldInfo) -> str:
    parts = [_word(part) for part in _parts(field.annotation) if part is not NoneType]
    bounds = [f"{sign} {getattr(one, key)}" for one in _metadata(field) for key, sign in _BOUNDS.items()
              if getattr(one, key, None) is not None]  # fmt: skip
    return " ".join([" or ".join(dict.fromkeys(parts)), *bounds])


def _metadata(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for part in _annotated(field.annotation):
        found += [inner for one in get_args(part)[1:] for inner in (getattr(one, "metadata", None) or [one])]
    return found


def _annotated(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield annotation
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _annotated(part)


def _parts(annotation: Any) -> list[Any]:
    """Return what an annotation is a union of."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for one in get_args(annotation) for part in _parts(one)]
    return [annotation]


def _word(part: Any) -> str:
    if get_origin(part) is Literal:
        return " or ".join(str(choice) for choice in get_args(part))
    if get_origin(part) is tuple:
        return (
            f"list of {' or '.join(dict.fromkeys(_word(p) for a in get_args(part) if a is not ... for p in _parts(a)))}"
        )
    if get_origin(part) is dict:
        return "table"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(part, "__name__", ""), getattr(part, "__name__", str(part))
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def _text(value: Any) -> str:
    return "none" if value is None else json.dumps(value, default=str) if not isinstance(value, str) else value
