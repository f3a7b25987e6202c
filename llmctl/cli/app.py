"""The command tree as Typer knows it: for help, for mistakes, and for what command.py does not read itself."""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Annotated, Any

import typer

from llmctl import __version__
from llmctl.cli.command import COMMANDS
from llmctl.cli.options import CONTEXT_SETTINGS, PlainGroup, add_command
from llmctl.cli.shell import PROGRAM, stderr_line
from llmctl.cli.streams import out

EXIT_CODES = """\
Exit codes: 0 done · 1 failed · 2 usage or config error, nothing was created · 3 finished, some records failed ·
4 bad, corrupt or unsafe input · 5 could not write · 6 not finite · 7 quality gate not met · 10 not found ·
11 locked by another run · 129/130/143 ended by HUP/INT/TERM · 141 the reader of stdout went away"""


class _Commands(MutableMapping[str, Any]):
    """Name -> command. Those of COMMANDS are imported and declared when they are asked for: declaring all took half of a start."""

    def __init__(self, declared: MutableMapping[str, Any]) -> None:
        self._declared = dict(declared)

    def __getitem__(self, name: str) -> Any:
        if name not in self._declared and name in COMMANDS:
            alone = typer.Typer(**_STYLE)
            alone.callback()(lambda: None)  # with a callback it is a group, however many commands there are
            module = importlib.import_module(f"llmctl.cli.{name}")
            if hasattr(module, "COMMAND"):
                add_command(alone, module.COMMAND)
            else:
                module.register(alone)
            self._declared[name] = typer.main.get_command(alone).commands[name]  # type: ignore[attr-defined]
        return self._declared[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._declared[name] = command

    def __delitem__(self, name: str) -> None:
        del self._declared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*COMMANDS, *self._declared)))

    def __len__(self) -> int:
        return len({*COMMANDS, *self._declared})


class _Program(PlainGroup):
    """The group of all commands, none of which is declared before it is needed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands(self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for --help and completion."""
        return list(self.commands)


_STYLE: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "context_settings": CONTEXT_SETTINGS}
app = typer.Typer(
    cls=_Program,
    name=PROGRAM,
    help="The whole life of a decoder-only language model: tokenize, pretrain, finetune, generate, eval, export.",
    epilog=EXIT_CODES,
    add_completion=False,
    invoke_without_command=True,
    **_STYLE,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.line(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """The whole life of a decoder-only language model: tokenize, pretrain, finetune, generate, eval, export."""
    if context.invoked_subcommand is None:
        stderr_line(context.get_help())
        raise typer.Exit(2)
