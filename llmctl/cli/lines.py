"""Lines of files and of stdin for filters, as bytes, as they come. Knows descriptors; knows no ids.

A line ends at \\n and nowhere else, so that \\r, NUL and Unicode's own line ends are text.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from llmctl.cli.shell import Shell
from llmctl.cli.streams import out, stdin_is_terminal
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, PartialFailure, UsageError

T = TypeVar("T")

_BLOCK_BYTES = 1 << 16
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its newline. `offset` is where it starts in its file, in bytes; `ended` whether a newline follows.

    `error` says what is wrong where there is no data: "is too long".
    """

    file: str
    number: int
    offset: int
    data: bytes
    ended: bool
    error: str | None = None

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.file}: line {self.number}"


class BadLine(Exception):
    """A line that cannot be taken. The message is the reason alone."""


def line_batches(files: Sequence[Path], shell: Shell, *, max_line_bytes: int) -> Iterator[list[Line]]:
    """The lines of `files`, or of stdin, in batches of what can be had without waiting.

    Raises NotFoundError, UsageError (stdin is closed) and InputError (a file in UTF-16).
    """
    names = [str(file) for file in files] or ["-"]
    if names.count("-") > 1:
        raise UsageError("stdin (`-`) is named twice; it can be read once")
    for name in names:
        if name != "-" and not Path(name).exists():
            raise NotFoundError(f"{shown(name)}: no such file")
        if name != "-" and Path(name).is_dir():
            raise UsageError(f"{shown(name)}: is a folder, a file is wanted")
    for name in names:
        if name == "-":
            if sys.stdin is None:
                raise UsageError("stdin is closed, but text was expected there; pipe something in or name a file")
            if stdin_is_terminal():
                shell.note("reading lines from the terminal; end with Ctrl-D")
            yield from _batches("stdin", sys.stdin.buffer, max_line_bytes, shell)
        else:
            with _open(name) as file:
                yield from _batches(shown(name), file, max_line_bytes, shell)


def shown(name: str) -> str:
    """A file's name as text for messages; bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _open(name: str) -> IO[bytes]:
    try:
        return open(name, "rb")
    except OSError as error:
        raise InputError(f"cannot read {shown(name)}: {error.strerror}") from error


def _batches(name: str, file: IO[bytes], limit: int, shell: Shell) -> Iterator[list[Line]]:
    read: Callable[[int], bytes] = getattr(file, "read1", file.read)
    number, start, held, parts = 1, 0, 0, list[bytes]()
    head = b""
    while any(mark != head and mark.startswith(head) for mark in (_UTF8_MARK, *_UTF16_MARKS)) and (block := _read(read, name)):
        head += block  # a byte at a time may come; whoever sends a line waits for its answer
    if head.startswith(_UTF16_MARKS):
        raise InputError(f"{name}: this is UTF-16; convert it first, for instance: iconv -f UTF-16 -t UTF-8")
    if head.startswith(_UTF8_MARK):
        shell.note(f"{name}: the byte-order mark at its start is left out")
        head, start = head[len(_UTF8_MARK) :], len(_UTF8_MARK)
    block = head
    while block:
        lines = []
        *ends, rest = block.split(b"\n")
        for end in ends:
            held += len(end)
            lines.append(_line(name, number, start, [*parts, end], held, limit, ended=True))
            number, start, held, parts = number + 1, start + held + 1, 0, []
        held += len(rest)
        if rest and held <= limit:
            parts.append(rest)
        elif held > limit:
            parts = []
        if lines:
            yield lines
        block = _read(read, name)
    if held:
        yield [_line(name, number, start, parts, held, limit, ended=False)]


def _read(read: Callable[[int], bytes], name: str) -> bytes:
    try:
        return read(_BLOCK_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error


def _line(name: str, number: int, start: int, parts: list[bytes], held: int, limit: int, *, ended: bool) -> Line:
    if held > limit:
        error = f"is {_megabytes(held)}, the limit is {_megabytes(limit)} (--max-line-bytes)"
        return Line(name, number, start, b"", ended, error)
    return Line(name, number, start, b"".join(parts), ended)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.4g} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def filter_lines(
    batches: Iterator[list[Line]],
    parse: Callable[[Line], T],
    convert: Callable[[list[T]], list[str]],
    shell: Shell,
    *,
    skip_errors: bool,
) -> None:
    """Write one line for each line. What could be had without waiting is converted together, and flushed at once.

    The last line gets a newline if it had one, so that nothing is added to a file or lost from it; lines before a
    further file always do. `parse` raises BadLine. Raises InputError at the first bad line, after the good ones before it were
    written, or with `skip_errors` PartialFailure at the end.
    """
    num_lines = num_bad = 0
    is_open = False  # the last line written waits for its newline
    for batch in batches:
        taken: list[T] = []
        ends: list[bytes] = []
        failure: str | None = None
        for line in batch:
            num_lines += 1
            try:
                if line.error is not None:
                    raise BadLine(line.error)
                taken.append(parse(line))
                ends.append(b"\n" if line.ended else b"")
            except BadLine as error:
                num_bad += 1
                failure = f"{line.where}{' ' if line.error else ': '}{error}"
                if not skip_errors:
                    break
                shell.warn(f"{failure}; left out")
        texts = convert(taken)
        pieces = [text.encode("utf-8", "replace") + end for text, end in zip(texts, ends, strict=True)]
        if pieces:
            out.write((b"\n" if is_open else b"") + b"".join(pieces))
            is_open = not ends[-1]
        if failure is not None and not skip_errors:
            raise InputError(f"{failure}; mend it, or leave such lines out with --on-error skip")
    if num_bad and num_bad == num_lines:
        raise LlmctlError(f"not one of {num_lines:,} lines could be read; the reasons are above")
    if num_bad:
        raise PartialFailure(f"{num_bad:,} of {num_lines:,} lines were left out; the reasons are above")
