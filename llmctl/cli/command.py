"""What a command is, and how a plain command line is read by the fields of its config alone. Knows config; knows no Typer.

Importing Typer and declaring flags to it takes longer than numpy does. Who writes known flags and values needs none of it; help,
mistakes, and what is written in any other way go to Typer (options.py), which understands more and says what is wrong.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.fields import FieldType, flag_of, info_of, options_of, types_of
from llmctl.core.config.resolve import Resolved, parse_text, resolve
from llmctl.core.errors import UsageError

COMMANDS = ("tokenize", "pretrain", "finetune", "generate", "eval", "export")
"""In the order in which a model meets them. Each is a module of this package with a COMMAND or, where it is a group, with `register`."""

COMMON = {
    "config": ("--config", "-c"),
    "print_config": ("--print-config",),
    "json": ("--json",),
    "quiet": ("--quiet", "-q"),
    "verbose": ("--verbose", "-v"),
    "debug": ("--debug",),
}
"""The flags that every command has. `config` takes a value, the others are switches."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: `run` gets the resolved config and the Shell.

    `name` is the full name ("tokenize pack"), which makes the environment variables' names too; each option field of `config` is a flag.
    """

    name: str
    config: type
    run: Callable[[Any, Shell], None]
    help: str
    epilog: str | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What stands on a command line: text, lists of text, or switches, by the names of the fields and of COMMON."""

    fields: Mapping[str, Any]
    common: Mapping[str, Any]


def call(command: Command, given: Given) -> None:
    """Resolve the config of `command` and run it, or show the config."""
    kinds = types_of(command.config)
    flag_names = {field.name: flag_of(field) for field in options_of(command.config)}
    common = {"config": None, **dict.fromkeys([*COMMON][1:], False), **given.common}
    shell = Shell(quiet=common["quiet"], verbose=common["verbose"], json=common["json"], debug=common["debug"])
    flags = {key: _parse(value, kinds[key], flag_names[key]) for key, value in given.fields.items()}
    resolved: Resolved[Any] = resolve(
        command.config,
        command=command.name,
        flags=flags,
        config_file=None if common["config"] is None else Path(common["config"]),
        environ=os.environ,
        to_show=common["print_config"],
    )
    if common["print_config"]:
        print_config(resolved)
        return
    shell.origins = resolved.origins
    command.run(resolved.config, shell)


def call_if_plain(arguments: list[str]) -> bool:
    """Run a plain command line. False, and nothing done, where Typer must read it."""
    if not arguments or arguments[0] not in COMMANDS:
        return False
    command: Command | None = getattr(importlib.import_module(f"llmctl.cli.{arguments[0]}"), "COMMAND", None)
    given = None if command is None else read_plain(arguments[1:], command)
    if command is None or given is None:
        return False
    call(command, given)
    return True


def read_plain(words: list[str], command: Command) -> Given | None:
    """What `words` give to the command; None unless each is a whole name of a flag, its value as a word or after "=", or an argument."""
    fields = {field.name: info_of(field) for field in options_of(command.config)}
    kinds = types_of(command.config)
    places = [name for name, info in fields.items() if info.positional]
    if len(places) > 1 and any(kinds[name].many for name in places):
        return None
    takers: dict[str, tuple[str, bool | None]] = {}  # name of a flag -> field, and what a switch says
    for field in options_of(command.config):
        if not fields[field.name].positional:
            is_switch = kinds[field.name].kind is bool
            for declared in declarations(field, is_switch=is_switch):
                on, _, off = declared.partition("/")
                takers[on] = (field.name, True if is_switch else None)
                if off:
                    takers[off] = (field.name, False)
    takers |= {flag: (f"common {name}", None if name == "config" else True) for name, flags in COMMON.items() for flag in flags}
    given: dict[str, Any] = {}
    arguments: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            arguments += rest
        elif not word.startswith("-") or word == "-":
            arguments.append(word)
        else:
            flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            if flag not in takers:
                return None
            name, says = takers[flag]
            if says is not None:
                if equals:
                    return None
                given[name] = says
                continue
            if not equals:
                value = next(rest, "--")
                if value.startswith("-") and value != "-":
                    return None
            if name in kinds and kinds[name].many:
                given.setdefault(name, []).append(value)
            else:
                given[name] = value
    if len(places) == 1 and kinds[places[0]].many and arguments:
        given[places[0]] = arguments
    elif len(arguments) > len(places):
        return None
    else:
        given |= zip(places, arguments, strict=False)
    common = {name.removeprefix("common "): value for name, value in given.items() if name.startswith("common ")}
    return Given({name: value for name, value in given.items() if name in kinds}, common)


def declarations(field: "dataclasses.Field[Any]", *, is_switch: bool) -> list[str]:
    """The names of a flag; those of a switch as "--x/--no-x"."""
    flag, info = flag_of(field), info_of(field)
    if is_switch:
        if any("/" in alias for alias in info.flags):  # --chat/--raw: the field has names of its own for both sides
            return list(info.flags)
        return [f"{flag}/--no-{flag.removeprefix('--')}", *info.flags]
    return [flag, *info.flags]


def _parse(value: Any, kind: FieldType, flag: str) -> Any:
    """What stands for a flag, as a value of the field's type. Text is parsed here rather than by Typer, whose
    messages change with its version and may leave out the value."""
    if kind.kind is bool:
        return value
    if kind.many:
        return tuple(parse_text(part, dataclasses.replace(kind, many=False), flag) for part in value)
    return parse_text(value, kind, flag)


def print_config(resolved: Resolved[Any]) -> None:
    """The settings on stdout as TOML, each with its origin as a comment; unset ones as comments."""
    from llmctl.core.config.stored import toml_value

    for field in options_of(type(resolved.config)):
        value = getattr(resolved.config, field.name)
        origin = resolved.origins[field.name]
        text = f"# {field.name} is not set" if value is None else f"{field.name} = {toml_value(value)}"
        out.line(f"{text}  # {origin}" if value is not None else text, flush=False)
    out.flush()


def need(value: Any, flag: str, why: str) -> Any:
    """`value`, or a UsageError that says that `flag` is missing and what it is for."""
    if value is None or value == ():
        raise UsageError(f"{flag} is missing: {why}")
    return value


def debug_requested() -> bool:
    """Whether --debug stands on the command line, for errors before it is parsed."""
    return "--debug" in sys.argv
