"""A run's settings as a TOML file in its folder, and back. Knows config dataclasses; knows no run."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmctl.core.config.fields import options_of
from llmctl.core.config.resolve import resolve
from llmctl.core.errors import InputError, UsageError

ConfigT = TypeVar("ConfigT")


def to_toml(config: Any, *, leave_out: Collection[str] = ()) -> str:
    """The settings of `config` that are set, as TOML; paths become absolute, so that the file works from any folder."""
    lines = []
    for field in options_of(type(config)):
        value = getattr(config, field.name)
        if value is not None and value != () and field.name not in leave_out:
            lines.append(f"{field.name} = {toml_value(_absolute(value))}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A config value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    text = json.dumps(os.fspath(value) if isinstance(value, os.PathLike) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON lets it stand, TOML does not


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    return os.path.abspath(value) if isinstance(value, os.PathLike) else value


def overlay(config: ConfigT, file: Path, *, origins: Mapping[str, str], keep: Collection[str] = ()) -> ConfigT:
    """`config` with the values stored in `file` wherever nothing was given for it now.

    `keep` names settings that never come from the file. Raises InputError when the file is damaged or cannot be read.
    """
    try:
        stored = resolve(type(config), command="", flags={}, config_file=file, environ={}, to_show=True)
    except UsageError as error:  # the file is the run's, nobody named it with --config
        raise InputError(f"{str(error).removeprefix('--config ')}; repair or remove it") from error
    given = {name for name, origin in origins.items() if origin != "default"}
    skipped = set(keep) | given
    values = {
        f.name: getattr(stored.config, f.name)
        for f in options_of(type(config))
        if f.name not in skipped and stored.origins[f.name] != "default"
    }
    return dataclasses.replace(config, **values)  # type: ignore[type-var]
