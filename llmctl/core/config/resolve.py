"""Merges flags, environment, config file and defaults into one frozen config, and remembers where each value came from."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmctl.core.config.fields import KIND_NAMES, FieldType, check_fields, options_of, types_of
from llmctl.core.errors import MissingSettingError, NotFoundError, UsageError

if TYPE_CHECKING:
    import tomllib

ConfigT = TypeVar("ConfigT")

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Resolved(Generic[ConfigT]):
    """A config and, for each field, where its value came from: "flag", "environment NAME", "file PATH" or "default"."""

    config: ConfigT
    origins: dict[str, str]


def resolve(
    cls: type[ConfigT],
    *,
    command: str,
    flags: Mapping[str, Any],
    config_file: Path | None,
    environ: Mapping[str, str],
    to_show: bool = False,
) -> Resolved[ConfigT]:
    """Build `cls` from the layers: flags win over environment, over the file, over defaults.

    `command` is "pretrain" or "tokenize pack"; it makes the names LLMCTL_PRETRAIN_<FIELD>. A field named `model` is also
    read from LLMCTL_MODEL, except by pretrain. `flags` holds only what was given. Raises UsageError that names the flag, variable, or file
    and key; NotFoundError when the file is missing. With `to_show`, what a command cannot do without may be missing.
    """
    kinds = types_of(cls)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(kinds, "default")

    def put(name: str, value: Any, origin: str) -> None:
        values[name] = value
        origins[name] = origin

    if config_file is not None:
        for name, value in _read_file(config_file, cls, kinds).items():
            put(name, value, f"file {config_file}")
    for name, value, variable in _read_environment(command, cls, kinds, environ):
        put(name, value, f"environment {variable}")
    for name, value in flags.items():
        put(name, tuple(value) if kinds[name].many else value, "flag")
    try:
        return Resolved(cls(**values), origins)
    except MissingSettingError:
        if not to_show:
            raise
    return Resolved(_unchecked(cls, values), origins)


def _read_file(path: Path, cls: type, kinds: Mapping[str, FieldType]) -> dict[str, Any]:
    import tomllib  # compiles regular expressions, which a start without a file does without

    text = ""
    try:
        text = path.read_bytes().decode("utf-8") + "\n"  # the newline makes the parser name a line, not "end of document"
        table = tomllib.loads(text)
    except FileNotFoundError as error:
        raise NotFoundError(f"--config {path}: no such file") from error
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}{_line_of(error, text)}") from error
    result: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise UsageError(f"--config {path}: unknown key {key!r}{_nearest(name, kinds)}")
        result[name] = _from_toml(value, kinds[name], f"--config {path}: {key}")
    try:
        _check_alone(cls, result)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error
    return result


def _line_of(error: "tomllib.TOMLDecodeError", text: str) -> str:
    """The line that the parser complains of, since it does not name the key (of a duplicate, for one)."""
    found = re.search(r"at line (\d+)", str(error))
    lines = text.split("\n")
    return f": {lines[int(found[1]) - 1].strip()[:80]!r}" if found and int(found[1]) <= len(lines) else ""


def _check_alone(cls: type, values: Mapping[str, Any]) -> None:
    """Check the values of one layer by themselves, so that the message can name the layer."""
    check_fields(_unchecked(cls, values))


def _unchecked(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A config with these values and defaults for the others, of which nothing is checked."""
    probe: Any = object.__new__(cls)
    for field in options_of(cls):
        kind_default = () if field.default is dataclasses.MISSING else field.default
        object.__setattr__(probe, field.name, values.get(field.name, kind_default))
    return probe  # type: ignore[no-any-return]


def _from_toml(value: Any, kind: FieldType, where: str) -> Any:
    if kind.many:
        if kind.kind is Path and isinstance(value, str):
            value = [value]  # one path may stand alone, as `data` does in runs that were stored when it was one
        if not isinstance(value, list):
            raise UsageError(f"{where}: a list is wanted, {value!r} was found")
        return tuple(_from_toml(v, FieldType(kind.kind, False, False), where) for v in value)
    if kind.kind is Path and isinstance(value, str):
        return Path(value)
    if kind.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind.kind) or (kind.kind is not bool and isinstance(value, bool)):
        raise UsageError(f"{where}: a {KIND_NAMES[kind.kind]} is wanted, {value!r} was found")
    return value


def _read_environment(command: str, cls: type, kinds: Mapping[str, FieldType], environ: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    prefix = f"LLMCTL_{command.replace(' ', '_').replace('-', '_').upper()}_"
    found = []
    # A standing LLMCTL_MODEL must not turn a pre-training from scratch into one that goes on from that model.
    if "model" in kinds and command != "pretrain" and environ.get("LLMCTL_MODEL"):
        found.append(("model", parse_text(environ["LLMCTL_MODEL"], kinds["model"], "environment variable LLMCTL_MODEL"), "LLMCTL_MODEL"))
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in kinds:
            raise UsageError(f"environment variable {variable}: `llmctl {command}` has no such setting{_nearest(name, kinds)}")
        value = parse_text(environ[variable], kinds[name], f"environment variable {variable}")
        try:
            _check_alone(cls, {name: value})
        except UsageError as error:
            raise UsageError(f"environment variable {variable}: {error}") from error
        found.append((name, value, variable))
    return found


def parse_text(text: str, kind: FieldType, where: str) -> Any:
    """`text` as a value of a field's type; a tuple is split at commas. Raises UsageError that begins with `where`."""
    if kind.many:
        return tuple(parse_text(part, FieldType(kind.kind, False, False), where) for part in text.split(",") if part)
    if kind.kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise UsageError(f"{where}: {text!r} is neither true nor false")
    try:
        return kind.kind(text)
    except ValueError as error:
        raise UsageError(f"{where}: {text!r} is not a {KIND_NAMES[kind.kind]}") from error


def _nearest(name: str, kinds: Mapping[str, FieldType]) -> str:
    import difflib  # for mistakes only

    close = difflib.get_close_matches(name, list(kinds), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(sorted(kinds))}"
