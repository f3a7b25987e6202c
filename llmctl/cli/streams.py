"""stdin and stdout as bytes, with the manners of a filter. Knows pipes and descriptors; knows no command.

stdout carries results only. It is written through `out`, which flushes when asked and turns a full disk, a closed
descriptor and a reader that went away into the right errors.
"""

import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from llmctl.core.errors import InputError, UsageError, WriteError, is_write_failure

STDOUT_NAME = "<stdout>"


class ReaderGone(Exception):
    """The reader of stdout went away (`| head`). The program ends silently with status 141."""


class _Out:
    """stdout, in bytes. Text is written as UTF-8 whatever the locale says; lone surrogates become U+FFFD."""

    def write(self, text: str | bytes, *, flush: bool = True) -> None:
        """Write a piece of a result. Raises WriteError or ReaderGone."""
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        if sys.stdout is None:
            raise WriteError("cannot write to stdout: it is closed; give it somewhere to go, for instance `> file`")
        try:
            sys.stdout.buffer.write(data)
            if flush:
                sys.stdout.buffer.flush()
        except OSError as error:
            raise stdout_failure(error) from error
        except ValueError as error:
            raise WriteError("cannot write to stdout: it is closed") from error

    def line(self, text: str = "", *, flush: bool = True) -> None:
        """Write one line of a result."""
        self.write(text + "\n", flush=flush)

    def flush(self) -> None:
        """Push out what is buffered. Raises WriteError or ReaderGone."""
        self.write(b"")

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads stdout directly."""
        return sys.stdout is not None and sys.stdout.isatty()


out = _Out()


def stdout_failure(error: OSError) -> Exception:
    """The exception that stands for a failed write to stdout."""
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    reason = "no space left" if is_write_failure(error) and error.errno == 28 else (error.strerror or str(error)).lower()
    return WriteError(f"cannot write to stdout: {reason}")


class _NamedStdout(io.FileIO):
    """Descriptor 1, whose errors say that it was stdout that could not be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            error.filename = STDOUT_NAME
            raise


def name_stdout() -> None:
    """Make the errors of every write to sys.stdout, Typer's help among them, name it; and make its text UTF-8."""
    if sys.stdout is not None:
        raw = _NamedStdout(sys.stdout.fileno(), "wb", closefd=False)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=raw.isatty())


def silence_stdout() -> None:
    """Point stdout at /dev/null, so that the interpreter's last flush cannot fail after the reader went away."""
    if sys.stdout is not None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.close(devnull)


def _stdin() -> Any:
    if sys.stdin is None:
        raise UsageError("stdin is closed, but input was expected there; pipe something in or name a file")
    return sys.stdin.buffer


def stdin_is_terminal() -> bool:
    """Whether stdin is a keyboard. A closed stdin is not."""
    return sys.stdin is not None and sys.stdin.isatty()


def stdin_has_input() -> bool:
    """Whether somebody sent something on stdin: a pipe, a file or a socket rather than a terminal, /dev/null or nothing."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_stdin(*, max_bytes: int | None = None) -> bytes:
    """All of stdin. Raises UsageError when it is closed, InputError when it is longer than `max_bytes`."""
    source = _stdin()
    if max_bytes is None:
        return bytes(source.read())
    data = bytes(source.read(max_bytes + 1))
    if len(data) > max_bytes:
        raise InputError(f"stdin holds more than {max_bytes:,} bytes, the limit here; send less, or use a file with a batch command")
    return data


def stdin_lines() -> Iterator[bytes]:
    """The lines of stdin as they come, each with its newline if it had one. Raises UsageError when stdin is closed."""
    yield from iter(_stdin().readline, b"")


def decode_utf8(data: bytes, *, where: str) -> str:
    """`data` as text, without a byte-order mark. Raises InputError with the offset of the first bad byte; names UTF-16."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{where}: this is UTF-16; convert it first, for instance: iconv -f UTF-16 -t UTF-8")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        line = f" (line {number})" if b"\n" in data else ""
        raise InputError(f"{where}: not valid UTF-8 at byte {error.start}{line}") from error
