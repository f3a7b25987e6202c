"""Finished scores on disk, so that the same command after a kill computes only the rest. Knows files; knows no model.

One JSON-lines file a job, named by a hash of everything that a score depends on (model, tokenizer, data set, settings).
Each row carries a checksum: a torn, flipped or foreign row is as good as absent. The file also says which data it was
made with, so that data changed under an interrupted job is noticed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmctl.core.errors import InputError, LockedError
from llmctl.core.files import FileLock

_FORMAT = "llmctl-eval-1"
_MAX_FOLDER_BYTES = 256 << 20
"""Beyond it the jobs that were not touched for the longest time are forgotten."""
_MAX_TWINS = 8
"""Runs of the same job at one time that each get a file of their own."""


def default_cache_dir(environ: Mapping[str, str]) -> Path | None:
    """$XDG_CACHE_HOME/llmctl/eval, or ~/.cache/llmctl/eval; None where there is no home."""
    base = environ.get("XDG_CACHE_HOME") or (os.path.join(environ["HOME"], ".cache") if environ.get("HOME") else None)
    return Path(base) / "llmctl" / "eval" if base else None


def job_key(facts: Mapping[str, Any]) -> str:
    """32 hex digits that stand for `facts` (JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Progress:
    """The finished scores of one job: unit name -> numbers. Without a folder it only remembers.

    Units are added in batches; a batch is on disk (in the page cache: it outlives the process) when `add` returns.
    `problem` says why nothing is kept, if so; scores never depend on the file.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[float]] = {}
        self._file: IO[bytes] | None = None
        self._lock: FileLock | None = None
        self.problem: str | None = None
        self.num_damaged = 0
        """Rows whose checksum did not hold."""

    @classmethod
    def open(cls, folder: Path | None, key: str, *, data: Mapping[str, str], restart: bool) -> "Progress":
        """The progress of job `key`. `data` maps each input's path to a hash of its content.

        Raises InputError when an unfinished run of this job used the same paths with another content, unless `restart`.
        """
        progress = cls()
        if folder is None:
            return progress
        try:
            folder.mkdir(parents=True, exist_ok=True)
            progress._open(folder, key, data, restart)
        except OSError as error:
            progress.close()
            progress.problem = f"{folder}: {error.strerror or error}"
        except BaseException:
            progress.close()
            raise
        return progress

    def _open(self, folder: Path, key: str, data: Mapping[str, str], restart: bool) -> None:
        # Another process at the same job holds the lock of its own file; what it has finished is read all the same.
        paths = [folder / (f"{key}.jsonl" if twin == 0 else f"{key}-{twin}.jsonl") for twin in range(_MAX_TWINS)]
        own: Path | None = None
        with contextlib.ExitStack() as stack:
            left_over = []
            for path in paths:
                if own is not None and not path.exists():
                    continue
                with contextlib.suppress(LockedError):
                    lock = FileLock(path.with_suffix(".lock"))
                    if own is None:
                        own, self._lock = path, lock
                    else:
                        stack.callback(lock.release)
                        left_over.append(path)
            if own is None:
                self.problem = f"{folder}: {_MAX_TWINS} runs of this command are under way"
                return
            for path in paths:
                if path.is_file() and not restart:
                    self._read(path, data)
            # Written anew with what holds, so that damage does not stay; renamed so that a kill leaves the old file.
            temp = own.with_suffix(f".tmp-{os.getpid()}")
            try:
                with open(temp, "wb") as file:
                    file.write(_line({"format": _FORMAT, "data": dict(data)}))
                    for unit, values in self._rows.items():
                        file.write(_line({"unit": unit, "values": values}))
                os.replace(temp, own)
            except OSError:
                temp.unlink(missing_ok=True)
                raise
            for path in left_over:
                path.unlink()
        _forget_old(folder, own)
        self._file = open(own, "ab")  # noqa: SIM115 - lives as long as the job

    def _read(self, path: Path, data: Mapping[str, str]) -> None:
        header: dict[str, Any] = {}
        rows: dict[str, list[float]] = {}
        finished = False
        with open(path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is None:
                    self.num_damaged += 1
                elif "format" in row:
                    header = row
                elif "unit" in row:
                    rows[row["unit"]] = row["values"]
                finished = finished or (row is not None and row.get("finished") is True)
        if header.get("format") != _FORMAT:
            return
        changed = [name for name, sha256 in data.items() if header["data"].get(name, sha256) != sha256]
        if changed and not finished:
            raise InputError(f"{changed[0]} has changed since this command was interrupted; put it back, or begin anew with --restart")
        if not changed:
            self._rows.update(rows)

    def rows(self) -> list[tuple[str, list[float]]]:
        """Every finished unit with its numbers."""
        return list(self._rows.items())

    def get(self, unit: str) -> list[float] | None:
        """The numbers of a finished unit."""
        return self._rows.get(unit)

    def add(self, units: Sequence[tuple[str, list[float]]]) -> None:
        """Remember a finished batch. A disk that fails sets `problem`; the job goes on."""
        self._rows.update(units)
        self._append(b"".join(_line({"unit": unit, "values": values}) for unit, values in units))

    def finish(self) -> None:
        """Mark the job as finished, after its results are safe."""
        self._append(_line({"finished": True}))

    def _append(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self.problem = f"{self._file.name}: {error.strerror or error}"
            self.close()

    def close(self) -> None:
        """Let the file and its lock go."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _forget_old(folder: Path, own: Path, *, max_bytes: int = _MAX_FOLDER_BYTES) -> None:
    """Remove the files that were written to last the longest ago until no more than `max_bytes` are left in the folder.

    One that is in use, and `own`, stay. The small lock files of those that go stay: another process may hold one.
    """
    found = []
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, path))
    excess = sum(size for _, size, _ in found) - max_bytes
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        if path == own:
            continue
        with contextlib.suppress(LockedError, OSError):
            lock = FileLock(path.with_suffix(".lock"))
            try:
                path.unlink()
                excess -= size
            finally:
                lock.release()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps({**row, "check": _check(row)}).encode() + b"\n"


def _check(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None if anything about it is wrong."""
    try:
        row = json.loads(line)
        check = row.pop("check")
        return row if check == _check(row) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
