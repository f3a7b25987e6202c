"""How a config field is declared and checked. Knows dataclasses; knows no command line and no file format."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.core.errors import UsageError

KINDS = (bool, int, float, str, Path)
_AS_THERE: Any = object()
KIND_NAMES: dict[type, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


@dataclass(frozen=True)
class FieldInfo:
    """What `option` says of a field. Bounds are inclusive unless named `above`/`below`."""

    help: str
    flags: tuple[str, ...]
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    metavar: str | None
    positional: bool
    panel: str | None


@dataclass(frozen=True)
class FieldType:
    """A field's type, taken apart: `kind` is one of KINDS; `many` says tuple[kind, ...]; `optional` says `| None`."""

    kind: type
    many: bool
    optional: bool


def option(
    default: Any,
    help: str,
    *flags: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
    panel: str | None = None,
) -> Any:
    """Declare a config field of a command's frozen dataclass.

    The flag is the field's name in kebab-case; `flags` adds short forms and aliases ("-n", "--max-tokens"). A bool gets
    `--x/--no-x`. `None` as default means "not given". Numbers must be finite and within the bounds. A `tuple` field is a
    repeatable flag. `positional` makes it an argument instead of a flag. `panel` groups it in `--help`.
    """
    info = FieldInfo(help, flags, tuple(choices) if choices else None, minimum, maximum, above, below, metavar, positional, panel)
    return dataclasses.field(default=default, metadata={"option": info})


def option_like(cls: type, name: str, *, default: Any = _AS_THERE, help: str | None = None) -> Any:
    """Declare a field as the option `name` of another command's config: same flags, bounds and panel.

    `default` and `help` replace those of the model where they are given.
    """
    (model,) = (f for f in dataclasses.fields(cls) if f.name == name)
    info = info_of(model) if help is None else dataclasses.replace(info_of(model), help=help)
    return dataclasses.field(default=model.default if default is _AS_THERE else default, metadata={"option": info})


def info_of(field: "dataclasses.Field[Any]") -> FieldInfo:
    """The FieldInfo of a field declared with `option`."""
    return typing.cast(FieldInfo, field.metadata["option"])


def options_of(cls: type) -> list["dataclasses.Field[Any]"]:
    """The fields of `cls` declared with `option`, in order."""
    return [f for f in dataclasses.fields(cls) if "option" in f.metadata]


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """How messages call the field: `--kebab-name`, or the metavar of an argument."""
    info = info_of(field)
    return (info.metavar or field.name.upper()) if info.positional else "--" + field.name.replace("_", "-")


def types_of(cls: type) -> Mapping[str, FieldType]:
    """Field name -> FieldType for every option of `cls`."""
    known = _KNOWN_TYPES.get(cls)
    if known is None:
        hints = typing.get_type_hints(cls)
        known = _KNOWN_TYPES[cls] = {f.name: _take_apart(hints[f.name]) for f in options_of(cls)}
    return known


_KNOWN_TYPES: dict[type, Mapping[str, FieldType]] = {}
"""Taking types apart is slow, and every start asks for each flag of each command."""


def _take_apart(hint: Any) -> FieldType:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        optional = len(inner) < len(typing.get_args(hint))
        (hint,) = inner
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    if kind not in KINDS:
        raise TypeError(f"a config field cannot have the type {hint!r}")
    return FieldType(kind, many, optional)


def check_fields(config: Any) -> None:
    """Check every option of a frozen config: type, finiteness, bounds, choices. Call it first in `__post_init__`.

    Raises UsageError that names the flag, the value found and what is allowed.
    """
    kinds = types_of(type(config))
    for field in options_of(type(config)):
        kind = kinds[field.name]
        value = getattr(config, field.name)
        if value is None:
            if not kind.optional:
                raise UsageError(f"{flag_of(field)}: a value is needed")
            continue
        for item in value if kind.many else (value,):
            _check_value(field, kind.kind, item)


def _check_value(field: "dataclasses.Field[Any]", kind: type, value: Any) -> None:
    info, flag = info_of(field), flag_of(field)
    right = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    if kind is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right:
        raise UsageError(f"{flag}: {value!r} is not a {KIND_NAMES[kind]}")
    if info.choices is not None and value not in info.choices:
        raise UsageError(f"{flag}: {value!r} is not one of {', '.join(info.choices)}")
    if kind not in (int, float):
        return
    if not math.isfinite(value):
        raise UsageError(f"{flag}: {value} is not a finite number")
    limits = (
        (info.minimum is not None and value < info.minimum, f"at least {info.minimum}"),
        (info.maximum is not None and value > info.maximum, f"at most {info.maximum}"),
        (info.above is not None and value <= info.above, f"above {info.above}"),
        (info.below is not None and value >= info.below, f"below {info.below}"),
    )
    for broken, rule in limits:
        if broken:
            raise UsageError(f"{flag}: {value} is out of range; it must be {rule}")


def shard_of(text: str) -> tuple[int, int]:
    """`--shard I/N` as (I, N), I from 1. Raises UsageError."""
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard {text}: I/N is wanted, I from 1 to N, for instance 2/4")
    return int(index), int(count)
