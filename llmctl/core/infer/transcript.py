"""Talks on the disk: JSON lines, one for each thing that happened, appended at once. Knows rows and turns; knows no model.

    {"kind": "talk", "format": 1, "model": "…", "chat": true, "seed": 7, "system": null}     a talk begins
    {"role": "user", "content": "…"}                                 a message; it replaces one that has no answer
    {"role": "assistant", "content": "…", "finish": "eos", …}        its answer
    {"role": "system", "content": "…"}                               another system message, or none (null)
    {"kind": "undo"}  {"kind": "retry"}  {"kind": "clear"}           what was taken back

A file may hold several talks, one after the other; the last one counts.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, LockedError, NotFoundError, UsageError, write_error
from llmctl.core.files import atomic_write, parse_json
from llmctl.core.infer.results import to_line
from llmctl.core.infer.talk import Turn

FORMAT = 1


@dataclass(kw_only=True)
class StoredTalk:
    """A talk as a transcript has it."""

    model: str
    chat: bool
    seed: int
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    num_left_out: int = 0

    def head(self) -> dict[str, Any]:
        """The row with which it begins."""
        return {"kind": "talk", "format": FORMAT, "model": self.model, "chat": self.chat, "seed": self.seed, "system": self.system}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of a transcript that holds just this, with nothing taken back but what numbers the answers."""
        yield self.head()
        for turn in self.turns:
            yield {"role": "user", "content": turn.message}
            yield from ({"kind": "retry"} for _ in range(turn.num_retries))
            if turn.answer is not None:
                yield {"role": "assistant", "content": turn.answer}
        if self.num_left_out:
            yield {"kind": "left_out", "num_turns": self.num_left_out}


class Transcript:
    """An open transcript, which no other process writes to. Each row is on the disk when `append` is done."""

    def __init__(self, path: Path, *, flag: str) -> None:
        """Open for appending; `flag` named it. Raises UsageError when it cannot be written to, LockedError when another does."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"{flag} {path}: {(error.strerror or str(error)).lower()}; choose a file that you may write to") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise LockedError(f"{path} is being written by another run; wait for it, or choose another --transcript") from error
        self.num_torn_bytes = self._cut_torn_tail()

    def _cut_torn_tail(self) -> int:
        """Cut off what stands after the last newline: a row that a kill tore. Gives its length."""
        size = position = os.fstat(self._fd).st_size
        while position > 0:
            start = max(position - (1 << 16), 0)
            found = os.pread(self._fd, position - start, start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < size:
            os.ftruncate(self._fd, position)
        return size - position

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. Raises WriteError."""
        data = to_line(row)
        start = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise write_error(error, path=self.path, then="take the talk up with --continue") from error

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def __enter__(self) -> "Transcript":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_talk(talk: StoredTalk, path: Path) -> None:
    """Write a talk to a file of its own. Raises UsageError when there is one, WriteError."""
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already; choose another name")
    with atomic_write(path) as file:
        file.writelines(to_line(row) for row in talk.rows())


def read_talk(path: Path) -> StoredTalk:
    """The last talk of a transcript; a torn last line does not count.

    Raises NotFoundError, and InputError that names the line when the file is no transcript.
    """
    talk: StoredTalk | None = None
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                row = parse_json(line, where=f"{path}: line {number}")
                if not isinstance(row, dict):
                    raise InputError(f"{path}: line {number}: a JSON object is wanted")
                talk = _next(talk, row, f"{path}: line {number}")
    except FileNotFoundError as error:
        raise NotFoundError(f"--continue {path}: no such file; a talk is kept with --transcript FILE") from error
    except OSError as error:
        raise UsageError(f"--continue {path}: {(error.strerror or str(error)).lower()}") from error
    if talk is None:
        raise InputError(f"--continue {path}: holds no talk; begin one with --transcript")
    return talk


def _next(talk: StoredTalk | None, row: Mapping[str, Any], where: str) -> StoredTalk:
    """The talk after one more row."""
    if row.get("kind") == "talk":
        return _begun(row, where)
    if talk is None:
        raise InputError(f"{where}: a talk begins with a row of the kind talk; is this a transcript of llmctl generate?")
    match row:
        case {"role": "user", "content": str(text)}:
            if talk.turns and talk.turns[-1].answer is None:
                talk.turns.pop()
            talk.turns.append(Turn(message=text))
        case {"role": "assistant", "content": str(text)} if talk.turns and talk.turns[-1].answer is None:
            talk.turns[-1].answer = text
            talk.num_left_out = _count(row, "num_left_out", talk.num_left_out)
        case {"role": "system", "content": str() | None as text}:
            talk.system = text
        case {"kind": "undo"} if talk.turns:
            talk.turns.pop()
            talk.num_left_out = min(talk.num_left_out, max(len(talk.turns) - 1, 0))
        case {"kind": "retry"} if talk.turns:
            talk.turns[-1].answer = None
            talk.turns[-1].num_retries += 1
        case {"kind": "clear"}:
            talk.turns.clear()
            talk.num_left_out = 0
        case {"kind": "left_out"}:
            talk.num_left_out = _count(row, "num_turns", 0)
        case _:
            raise InputError(f"{where}: is not what can come next in a transcript; mend or remove that line")
    return talk


def _begun(row: Mapping[str, Any], where: str) -> StoredTalk:
    match row:
        case {"format": int(format), "model": str(model), "chat": bool(chat), "seed": int(seed), "system": str() | None as system}:
            if format != FORMAT:
                raise InputError(f"{where}: is of format {format}, and this llmctl reads format {FORMAT}; use a newer one")
            return StoredTalk(model=model, chat=chat, seed=seed, system=system)
    raise InputError(f"{where}: a talk's first row has format, model, chat, seed and system")


def _count(row: Mapping[str, Any], name: str, default: int) -> int:
    value = row.get(name, default)
    return value if isinstance(value, int) and value >= 0 else default
