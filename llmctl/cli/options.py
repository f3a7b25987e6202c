"""Turns a frozen config dataclass into a Typer command: one field, one flag. Knows Typer and config; knows no command."""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from llmctl.cli.shell import Shell
from llmctl.core.config.fields import FieldInfo, FieldType, flag_of, info_of, options_of, types_of
from llmctl.core.config.resolve import Resolved, parse_text, resolve
from llmctl.core.errors import UsageError

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Registered:
    """What was registered as a command: the docs and the completions are made from it."""

    config: type
    help: str
    epilog: str | None


REGISTERED: dict[str, Registered] = {}
"""Full name of a command ("tokenize pack") -> what it is, in order of registration; main.py registers a command when it is asked for."""

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_COMMON_PANEL = "Every command"
_METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X", Path: "PATH"}


class PanelCommand(TyperCommand):
    """A command whose plain-text help lists its flags by panel. Rich could, but importing it would double the start-up time."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, --help among them."""
        return taken_as_given(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each panel, in the order in which the panels first occur; the common one last."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                record = (record[0].partition(" <")[0], record[1])  # recent Typer versions add the Python type of an argument
                panel = _COMMON_PANEL if parameter.name == "help" else getattr(parameter, "rich_help_panel", None) or default
                panels.setdefault(panel, []).append(record)
        common = panels.pop(_COMMON_PANEL, [])
        for title, records in [*panels.items(), (_COMMON_PANEL, common)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class PlainGroup(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, --help among them."""
        return taken_as_given(super().get_params(ctx))


def add_command(
    app: typer.Typer,
    *,
    name: str,
    command: str,
    config: type[ConfigT],
    run: Callable[[ConfigT, Shell], None],
    help: str,
    epilog: str | None = None,
) -> None:
    """Register `run` on `app` as command `name`, with one flag for each option field of `config`.

    `command` is the full name ("tokenize pack"): it makes the environment variables' names. `run` gets the resolved
    config and the Shell; --config, --print-config, --json, --quiet, --verbose and --debug are added here.
    """

    def invoke(**given: Any) -> None:
        common = {key: given.pop(f"common_{key}") for key in ("config", "print_config", "json", "quiet", "verbose", "debug")}
        shell = Shell(quiet=common["quiet"], verbose=common["verbose"], json=common["json"], debug=common["debug"])
        flags = {key: _parse(value, kinds[key], flag_names[key]) for key, value in given.items() if value is not None and value != []}
        to_show = common["print_config"]
        file = None if common["config"] is None else Path(common["config"])
        resolved = resolve(config, command=command, flags=flags, config_file=file, environ=os.environ, to_show=to_show)
        if to_show:
            print_config(resolved)
            return
        shell.origins = resolved.origins
        run(resolved.config, shell)

    kinds = types_of(config)
    flag_names = {field.name: flag_of(field) for field in options_of(config)}
    parameters = [_parameter(field, config) for field in options_of(config)]
    parameters += _common_parameters(command)
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__name__ = name.replace("-", "_")
    REGISTERED[command] = Registered(config, help, epilog)
    app.command(name=name, help=help, epilog=epilog, cls=PanelCommand, no_args_is_help=False, context_settings=CONTEXT_SETTINGS)(invoke)


def taken_as_given(parameters: list[Any]) -> list[Any]:
    """Click's `parameters`, made to give text, lists of text or switches as they stand on the command line.

    `_parse` makes values of them. Typer would have pydantic look at each, whose import takes longer than the rest of a start.
    """
    for parameter in parameters:
        parameter.process_value = functools.partial(_as_given, parameter)
    return parameters


def _as_given(parameter: Any, context: Any, value: Any) -> Any:
    """Stands in for Click's `process_value`, for parameters that may be left out."""
    if value is None and (parameter.multiple or parameter.nargs == -1):
        value = ()
    return value if parameter.callback is None else parameter.callback(context, parameter, value)


def _parse(value: Any, kind: FieldType, flag: str) -> Any:
    """What Typer gives for a flag, as a value of the field's type. Text is parsed here rather than by Typer, whose
    messages change with its version and may leave out the value."""
    if kind.kind is bool:
        return value
    if kind.many:
        return tuple(parse_text(part, dataclasses.replace(kind, many=False), flag) for part in value)
    return parse_text(value, kind, flag)


def _parameter(field: "dataclasses.Field[Any]", config: type) -> inspect.Parameter:
    info, kind = info_of(field), types_of(config)[field.name]
    base: Any = bool if kind.kind is bool else str
    hint: Any = list[base] | None if kind.many else base | None
    shown = _help_text(field, info)
    if info.positional:
        detail: Any = typer.Argument(help=shown, metavar=info.metavar, show_default=False)
    else:
        metavar = info.metavar or ("|".join(info.choices) if info.choices else _METAVARS.get(kind.kind))
        detail = typer.Option(
            *_declarations(field, info, kind.kind), help=shown, metavar=metavar, show_default=False, rich_help_panel=info.panel
        )
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, detail])


def _declarations(field: "dataclasses.Field[Any]", info: FieldInfo, kind: type) -> list[str]:
    flag = flag_of(field)
    if kind is bool:
        if any("/" in alias for alias in info.flags):  # --chat/--raw: the field has names of its own for both sides
            return list(info.flags)
        return [f"{flag}/--no-{flag.removeprefix('--')}", *info.flags]
    return [flag, *info.flags]


def _help_text(field: "dataclasses.Field[Any]", info: FieldInfo) -> str:
    default = field.default
    if default is None or default is dataclasses.MISSING or default in ((), "") or default is False or info.positional:
        return info.help
    text = "on" if default is True else default
    return f"{info.help} [default: {text}]"


def _common_parameters(command: str) -> list[inspect.Parameter]:
    prefix = f"LLMCTL_{command.replace(' ', '_').upper()}_"

    def switch(name: str, help: str, *flags: str) -> inspect.Parameter:
        detail = typer.Option(*flags, help=help, rich_help_panel=_COMMON_PANEL, show_default=False)
        return inspect.Parameter(f"common_{name}", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, detail])

    config = typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help=f"Read settings from a TOML file. Flags win, then {prefix}* variables, then the file.",
        rich_help_panel=_COMMON_PANEL,
        show_default=False,
    )
    return [
        inspect.Parameter("common_config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, config]),
        switch("print_config", "Show each setting and where it came from, then stop.", "--print-config"),
        switch("json", "Results as JSON on stdout.", "--json"),
        switch("quiet", "No notes and no progress; warnings stay.", "--quiet", "-q"),
        switch("verbose", "More notes on stderr.", "--verbose", "-v"),
        switch("debug", "A traceback with every error.", "--debug"),
    ]


def print_config(resolved: Resolved[Any]) -> None:
    """The settings on stdout as TOML, each with its origin as a comment; unset ones as comments."""
    from llmctl.cli.streams import out

    for field in options_of(type(resolved.config)):
        value = getattr(resolved.config, field.name)
        origin = resolved.origins[field.name]
        text = f"# {field.name} is not set" if value is None else f"{field.name} = {toml_value(value)}"
        out.line(f"{text}  # {origin}" if value is not None else text, flush=False)
    out.flush()


def toml_value(value: Any) -> str:
    """A config value as TOML."""
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    text = json.dumps(os.fspath(value) if isinstance(value, os.PathLike) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON lets it stand, TOML does not


def need(value: Any, flag: str, why: str) -> Any:
    """`value`, or a UsageError that says that `flag` is missing and what it is for."""
    if value is None or value == ():
        raise UsageError(f"{flag} is missing: {why}")
    return value


def debug_requested() -> bool:
    """Whether --debug stands on the command line, for errors before it is parsed."""
    return "--debug" in sys.argv
