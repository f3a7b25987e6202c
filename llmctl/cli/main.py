"""The program: the commands, and the boundary where every error becomes one line and an exit code.

Importing this must stay cheap: typer, stdlib and floor 0 only. A command's module is imported when the command is asked for, and
imports torch, transformers and rich inside the functions that need them.
"""

import errno
import gc
import importlib
import signal
import sys
from collections.abc import Iterator, MutableMapping
from typing import Annotated, Any

import typer

from llmctl import __version__
from llmctl.cli.options import CONTEXT_SETTINGS, PlainGroup, debug_requested
from llmctl.cli.shell import PROGRAM, stderr_line
from llmctl.cli.signals import die_by
from llmctl.cli.streams import STDOUT_NAME, ReaderGone, name_stdout, out, silence_stdout, stdout_failure
from llmctl.core.errors import Interrupted, LlmctlError, LostRankError, WriteError, is_write_failure

EXIT_CODES = """\
Exit codes: 0 done · 1 failed · 2 usage or config error, nothing was created · 3 finished, some records failed ·
4 bad, corrupt or unsafe input · 5 could not write · 6 not finite · 7 quality gate not met · 10 not found ·
11 locked by another run · 129/130/143 ended by HUP/INT/TERM · 141 the reader of stdout went away"""

COMMANDS = ("tokenize", "pretrain", "finetune", "generate", "eval", "export")
"""In the order in which a model meets them. Each is a module of this package with a function `register`."""


class _Commands(MutableMapping[str, Any]):
    """Name -> command. Those of COMMANDS are imported and declared when they are asked for: declaring all took half of a start."""

    def __init__(self, declared: MutableMapping[str, Any]) -> None:
        self._declared = dict(declared)

    def __getitem__(self, name: str) -> Any:
        if name not in self._declared and name in COMMANDS:
            alone = typer.Typer(**_STYLE)
            alone.callback()(lambda: None)  # with a callback it is a group, however many commands there are
            importlib.import_module(f"llmctl.cli.{name}").register(alone)
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


def main() -> None:
    """Run the command line and end the process with the exit code of DESIGN's table."""
    if sys.version_info < (3, 11) or sys.platform not in ("linux", "darwin"):
        stderr_line(f"{PROGRAM}: error: Linux or macOS and Python 3.11 or newer are needed")
        raise SystemExit(1)
    name_stdout()
    code = run(sys.argv[1:])
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        code = _report(stdout_failure(error))
    gc.freeze()  # so that the interpreter, as it ends, does not look through all that it will drop anyway
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and give its exit code. May end the process by a signal, as the contract wants."""
    try:
        if sys.stdout is None and not {"-h", "--help"} & set(arguments):
            raise WriteError("cannot write to stdout: it is closed; give it somewhere to go, for instance `> file`")
        code: Any = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        if code == 128 + signal.SIGINT:  # what recent Typer versions make of a KeyboardInterrupt
            raise KeyboardInterrupt
        out.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        return _report(error)


def _report(error: BaseException) -> int:
    """Say what happened, in one line, and give the exit code."""
    # Typer prints the help by itself, and turns a BrokenPipeError there into SystemExit.
    if isinstance(error, ReaderGone | BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    ):
        silence_stdout()
        return 128 + signal.SIGPIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError) and error.filename == STDOUT_NAME:
        error = stdout_failure(error)
    if debug_requested() and not isinstance(error, typer.Exit):
        import traceback

        stderr_line(redact("".join(traceback.format_exception(error)).rstrip()))
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _last_line("error: interrupted", exit_code=128 + signal.SIGINT)
        return _end_by(signal.SIGINT)
    if isinstance(error, Interrupted):
        _last_line(str(error), exit_code=error.exit_code)
        return _end_by(error.signal_number)
    if isinstance(error, typer.Exit):
        return error.exit_code
    message, code = describe(error)
    if isinstance(error, WriteError):
        silence_stdout()
    _last_line(f"error: {redact(message)}", exit_code=code, lost=isinstance(error, LostRankError))
    return code


def _last_line(text: str, *, exit_code: int, lost: bool = False) -> None:
    """The line that says why the program ends. Of several ranks, the first or the launcher writes it for all."""
    import os

    from llmctl.core.distributed import leave_last_words, place_of

    place = place_of(os.environ)
    if leave_last_words(text.removeprefix("error: "), exit_code=exit_code, lost=lost):
        return
    if place.is_main:
        stderr_line(f"{PROGRAM}: {text}")
    elif text.startswith("error: "):
        stderr_line(f"{PROGRAM}: error: rank {place.rank}: {text.removeprefix('error: ')}")


def describe(error: BaseException) -> tuple[str, int]:
    """The line for people and the exit code of an exception."""
    if isinstance(error, LlmctlError):
        return one_line(str(error)), error.exit_code
    # Typer carries its own click from 0.20-odd on and uses the real one before, so its errors are told by their manner.
    format_message = getattr(error, "format_message", None)
    if callable(format_message):
        context = getattr(error, "ctx", None)
        hint = f"; see `{context.command_path} --help`" if context is not None else ""
        return one_line(format_message()).rstrip(".") + hint, 2
    if isinstance(error, OSError) and is_write_failure(error):
        return one_line(f"cannot write {error.filename or 'a file'}: {error.strerror}"), 5
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return one_line(f"{error.filename}: no such file or folder"), 10
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}"), {errno.ENAMETOOLONG: 2, errno.EACCES: 4, errno.EPERM: 4}.get(
            error.errno or 0, 1
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try a smaller model, batch or context", 1
    return one_line(f"unexpected {type(error).__name__}: {error}") + "; run again with --debug and report this", 1


def one_line(text: str) -> str:
    """`text` with every run of white space as one space, so that an error is always one line."""
    return " ".join(text.split())


def redact(text: str) -> str:
    """`text` without the values of environment variables that hold secrets."""
    import os

    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY")):
            text = text.replace(value, "***")
    return text


def _end_by(number: int) -> int:
    out_flush_quietly()
    die_by(number)
    return 128 + number  # reached only where the signal is blocked


def out_flush_quietly() -> None:
    """Flush stdout before the process dies by a signal; a failure here has nobody left to tell."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()
