"""Turns a Command into one of Typer: one field of its config, one flag. Knows Typer and config; knows no command."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from llmctl.cli.command import COMMON, Command, Given, call, declarations
from llmctl.core.config.fields import FieldInfo, info_of, options_of, types_of

REGISTERED: dict[str, Command] = {}
"""Full name -> command, in order of registration; app.py registers a command when it is asked for. Docs and completions read it."""

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


def add_command(app: typer.Typer, command: Command) -> None:
    """Register `command` on `app`, with one flag for each option field of its config, and those of COMMON."""

    def invoke(**given: Any) -> None:
        common = {key: given.pop(f"common_{key}") for key in COMMON}
        call(command, Given({key: value for key, value in given.items() if value is not None and value != []}, common))

    name = command.name.rpartition(" ")[2]
    parameters = [_parameter(field, command.config) for field in options_of(command.config)]
    parameters += _common_parameters(command.name)
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__name__ = name.replace("-", "_")
    REGISTERED[command.name] = command
    declare = app.command(
        name=name, help=command.help, epilog=command.epilog, cls=PanelCommand, no_args_is_help=False, context_settings=CONTEXT_SETTINGS
    )
    declare(invoke)


def taken_as_given(parameters: list[Any]) -> list[Any]:
    """Click's `parameters`, made to give text, lists of text or switches as they stand on the command line.

    `call` makes values of them. Typer would have pydantic look at each, whose import takes longer than the rest of a start.
    """
    for parameter in parameters:
        parameter.process_value = functools.partial(_as_given, parameter)
    return parameters


def _as_given(parameter: Any, context: Any, value: Any) -> Any:
    """Stands in for Click's `process_value`, for parameters that may be left out."""
    if value is None and (parameter.multiple or parameter.nargs == -1):
        value = ()
    return value if parameter.callback is None else parameter.callback(context, parameter, value)


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
            *declarations(field, is_switch=kind.kind is bool), help=shown, metavar=metavar, show_default=False, rich_help_panel=info.panel
        )
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, detail])


def _help_text(field: "dataclasses.Field[Any]", info: FieldInfo) -> str:
    default = field.default
    if default is None or default is dataclasses.MISSING or default in ((), "") or default is False or info.positional:
        return info.help
    text = "on" if default is True else default
    return f"{info.help} [default: {text}]"


def _common_parameters(command: str) -> list[inspect.Parameter]:
    prefix = f"LLMCTL_{command.replace(' ', '_').upper()}_"

    def switch(name: str, help: str) -> inspect.Parameter:
        detail = typer.Option(*COMMON[name], help=help, rich_help_panel=_COMMON_PANEL, show_default=False)
        return inspect.Parameter(f"common_{name}", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, detail])

    config = typer.Option(
        *COMMON["config"],
        metavar="FILE",
        help=f"Read settings from a TOML file. Flags win, then {prefix}* variables, then the file.",
        rich_help_panel=_COMMON_PANEL,
        show_default=False,
    )
    return [
        inspect.Parameter("common_config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, config]),
        switch("print_config", "Show each setting and where it came from, then stop."),
        switch("json", "Results as JSON on stdout."),
        switch("quiet", "No notes and no progress; warnings stay."),
        switch("verbose", "More notes on stderr."),
        switch("debug", "A traceback with every error."),
    ]
