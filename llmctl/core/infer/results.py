"""The result file of a batch job: appended to, survives a kill, refuses a different job. Knows JSONL; knows no model.

Beside OUT.jsonl stand OUT.jsonl.run.json, which says what job made it, and OUT.errors.jsonl, the rows that failed.
The result file itself is locked, so that two jobs cannot write to it at once.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.core.errors import InputError, LockedError, UsageError, is_write_failure, write_error
from llmctl.core.files import parse_json, read_json, write_json
from llmctl.core.infer.openai_rows import is_answer
from llmctl.core.infer.rows import id_key

FORMAT = 1
_FSYNC_EVERY_S = 1.0


class ResultFile:
    """An open, locked result file of `num_results` rows. `done` holds the (id, sample) keys of those of earlier runs."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Open and lock `path`. Raises UsageError when it cannot be written to, LockedError when another job holds it."""
        self.path = Path(path)
        self.job_path = job_path_of(self.path)
        self.errors_path = errors_path_of(self.path)
        self.done: set[str] = set()
        self.num_results = 0
        self.num_torn_bytes = 0
        self._errors_fd: int | None = None
        self._dirty = False
        self._synced_at = time.monotonic()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"--output {self.path}: {error.strerror}; choose a file that you may write to") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise LockedError(f"{self.path} is being written by another run; wait for it, or choose another --output") from error
        if overwrite:
            os.ftruncate(self._fd, 0)

    def begin(self, job: Mapping[str, Any], *, seed: int | None, drawn_seed: int) -> int:
        """Compare `job` (JSON values) with that of the rows that are there, or record it; give the seed that counts.

        That is `seed` if one was given, else the one that the rows were made with, else `drawn_seed`. Cuts a torn last
        line off and fills `done`. Raises InputError when the file was made by another job or by something else, and names what differs.
        """
        recorded = self._recorded() if os.fstat(self._fd).st_size else None
        if seed is None:
            seed = drawn_seed if recorded is None else recorded.get("seed", drawn_seed)
        whole = {"format": FORMAT, **job, "seed": seed}
        if recorded is None:
            write_json(self.job_path, whole)
        else:
            _compare(recorded, whole, where=self.path)
            self._read_done()
        with contextlib.suppress(FileNotFoundError):
            self.errors_path.unlink()  # its rows are tried again
        return int(seed)

    def _recorded(self) -> dict[str, Any]:
        if not self.job_path.is_file():
            raise InputError(
                f"{self.path} has content, but no {self.job_path.name} says what made it; choose another --output, or use --overwrite"
            )
        recorded = read_json(self.job_path)
        if not isinstance(recorded, dict):
            raise InputError(f"{self.job_path}: not a JSON object; use --overwrite to begin anew")
        return recorded

    def _read_done(self) -> None:
        good = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row = None
                with contextlib.suppress(InputError):
                    row = parse_json(line, where="") if line.endswith(b"\n") else None
                if not isinstance(row, dict) or "id" not in row:
                    if file.read(1):
                        raise InputError(f"{self.path}: line {number} is not a result row; repair it, or use --overwrite to begin anew")
                    break
                self.done.add(key_of(row))
                self.num_results += 1
                good += len(line)
        self.num_torn_bytes = os.fstat(self._fd).st_size - good
        if self.num_torn_bytes:
            os.ftruncate(self._fd, good)
        os.lseek(self._fd, 0, os.SEEK_END)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a result row; it is in the system's hands at once and on the disk within a second or so. Raises WriteError."""
        self._append(self._fd, row, self.path)
        self.num_results += 1

    def append_error(self, row: Mapping[str, Any]) -> None:
        """Add a row to the errors file. Raises WriteError."""
        if self._errors_fd is None:
            try:
                self._errors_fd = os.open(self.errors_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise write_error(error, path=self.errors_path) from error
        self._append(self._errors_fd, row, self.errors_path)

    def _append(self, fd: int, row: Mapping[str, Any], path: Path) -> None:
        data = to_line(row)
        start = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            self._dirty = True
            self.sync_if_due()
        except OSError as error:
            with contextlib.suppress(OSError):  # leave no half row, even though the next run would cut it off
                os.ftruncate(fd, start)
            if is_write_failure(error):
                raise write_error(error, path=path) from error
            raise

    def sync_if_due(self) -> None:
        """Put what was appended on the disk if the last time was a second ago. Raises WriteError."""
        if self._dirty and time.monotonic() - self._synced_at >= _FSYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Put everything on the disk. Raises WriteError."""
        try:
            self._sync()
        except OSError as error:
            raise write_error(error, path=self.path) from error

    def _sync(self) -> None:
        for fd in (self._fd, self._errors_fd):
            if fd is not None:
                os.fsync(fd)
        self._synced_at, self._dirty = time.monotonic(), False

    def close(self) -> None:
        """Put everything on the disk and give the lock back. Raises WriteError."""
        if self._fd < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._fd)
            if self._errors_fd is not None:
                os.close(self._errors_fd)
            self._fd = -1

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.close()


def job_path_of(path: Path) -> Path:
    """Where it stands what job made the result file `path`."""
    return path.with_name(path.name + ".run.json")


def errors_path_of(path: Path) -> Path:
    """Where the rows of `path` stand that failed."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".errors.jsonl")


def result_key(id: Any, sample: Any) -> str:
    """What names a result: the id, and the number of the sample."""
    return f"{sample} {id_key(id)}"


def key_of(row: Mapping[str, Any]) -> str:
    """The key of a result row; one in OpenAI's form, which holds all texts of its row, has that of the first."""
    return result_key(row["custom_id"], 0) if is_answer(row) else result_key(row["id"], row.get("sample", 0))


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of UTF-8 JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _compare(recorded: Mapping[str, Any], job: Mapping[str, Any], *, where: Path) -> None:
    differing = [name for name in dict.fromkeys([*recorded, *job]) if recorded.get(name) != job.get(name)]
    if differing:
        told = ", ".join(f"{name} ({_short(recorded.get(name))} before, {_short(job.get(name))} now)" for name in differing)
        raise InputError(f"{where} was made by another job, which differs in {told}; choose another --output, or use --overwrite")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
