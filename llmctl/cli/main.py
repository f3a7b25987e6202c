"""The program: the boundary where every error becomes one line and an exit code.

Importing this must stay cheap: stdlib and floor 0 only. A command's module is imported when the command is asked for, and
imports torch, transformers and rich inside the functions that need them; Typer (app.py) is imported where it must read the line.
"""

import errno
import gc
import signal
import sys
from typing import Any

from llmctl.cli.command import call_if_plain, debug_requested
from llmctl.cli.shell import PROGRAM, stderr_line
from llmctl.cli.signals import die_by
from llmctl.cli.streams import STDOUT_NAME, ReaderGone, name_stdout, out, silence_stdout, stdout_failure
from llmctl.core.errors import Interrupted, LlmctlError, LostRankError, WriteError, is_write_failure


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
        code: Any = 0 if call_if_plain(arguments) else _call_by_typer(arguments)
        if code == 128 + signal.SIGINT:  # what recent Typer versions make of a KeyboardInterrupt
            raise KeyboardInterrupt
        out.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        return _report(error)


def _call_by_typer(arguments: list[str]) -> Any:
    from llmctl.cli.app import app

    return app(args=arguments, prog_name=PROGRAM, standalone_mode=False)


def _is_typers(error: BaseException, name: str) -> bool:
    """Whether this is Typer's exception of that name. Where Typer was not imported, none is."""
    typer = sys.modules.get("typer")
    return typer is not None and isinstance(error, getattr(typer, name))


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
    if debug_requested() and not _is_typers(error, "Exit"):
        import traceback

        stderr_line(redact("".join(traceback.format_exception(error)).rstrip()))
    if isinstance(error, KeyboardInterrupt) or _is_typers(error, "Abort"):
        _last_line("error: interrupted", exit_code=128 + signal.SIGINT)
        return _end_by(signal.SIGINT)
    if isinstance(error, Interrupted):
        _last_line(str(error), exit_code=error.exit_code)
        return _end_by(error.signal_number)
    if _is_typers(error, "Exit"):
        return int(error.exit_code)  # type: ignore[attr-defined]
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
