"""A run folder: its lock, its stored settings, metrics.jsonl and status.json. Knows files; knows no model.

run/run.lock  config.toml  plan.json  status.json  metrics.jsonl  step-00000500/ ...
"""

import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from llmctl.core.errors import UsageError
from llmctl.core.files import FileLock, atomic_write, check_out_dir, read_json, remove_temporaries, write_json, write_text

LOCK_NAME, CONFIG_NAME, STATUS_NAME, METRICS_NAME = "run.lock", "config.toml", "status.json", "metrics.jsonl"
PLAN_NAME, ENERGY_NAME = "plan.json", "energy.json"

State = Literal["running", "interrupted", "failed", "done"]


class RunFolder:
    """A run folder that this process holds. `close` gives the lock back."""

    def __init__(self, path: Path, *, fresh: bool, writes: bool = True) -> None:
        """Create or enter the folder and take its lock.

        `fresh` wants a folder that is new or empty. Raises UsageError for one that is not, LockedError when another run
        holds it. Nothing is created before the checks. Without `writes` (another process of the same run holds the
        folder) nothing is checked, and what would be written is dropped.
        """
        self.path = Path(path)
        self._lock: FileLock | None = None
        self._metrics: Metrics | None = None
        self._writes = writes
        if not writes:
            return
        check_out_dir(self.path)
        held_names = set(os.listdir(self.path)) if self.path.is_dir() else set()
        if held_names and LOCK_NAME not in held_names and fresh:
            raise UsageError(f"--out-dir {self.path}: the folder is not empty and not a run; choose a new one")
        self.path.mkdir(exist_ok=True)
        self._lock = FileLock(self.path / LOCK_NAME)
        if fresh and self.is_used:
            self._lock.release()
            raise UsageError(
                f"--out-dir {self.path}: a run is there already; go on with it by --resume (or --auto-resume), or choose another folder"
            )
        remove_temporaries(self.path)

    @property
    def writes(self) -> bool:
        """Whether this process holds the folder; what another one would write is dropped."""
        return self._writes

    @property
    def is_used(self) -> bool:
        """Whether a run has left anything here."""
        return any(p.name != LOCK_NAME and not p.name.startswith(".tmp-") for p in self.path.iterdir())

    @property
    def distrust(self) -> str | None:
        """Why others than this user may have changed the run's files, or None."""
        status = self.path.stat()
        if status.st_uid != os.getuid():
            return f"{self.path} belongs to another user (uid {status.st_uid}): go on only if you trust what is in it"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"{self.path} may be written to by everybody: go on only if you trust what is in it, or run chmod o-w on it"
        return None

    @property
    def metrics(self) -> "Metrics":
        """The run's metrics.jsonl, opened for appending at first use."""
        if self._metrics is None:
            self._metrics = Metrics(self.path / METRICS_NAME, writes=self._writes)
        return self._metrics

    def store_config(self, text: str) -> None:
        """Keep the resolved settings, as TOML."""
        if not self._writes:
            return
        write_text(self.path / CONFIG_NAME, text)

    def store_plan(self, plan: Mapping[str, Any], *, machine: Mapping[str, Any]) -> None:
        """Keep what the run set out to do, and on what machine."""
        write_json(self.path / PLAN_NAME, {"plan": _finite(plan), "machine": machine})

    def set_status(self, state: State, *, step: int, num_steps: int, message: str | None = None, resume: str | None = None) -> None:
        """Say where the run stands; `resume` is the command that goes on with it."""
        if not self._writes:
            return
        status = {
            "state": state,
            "step": step,
            "num_steps": num_steps,
            "message": message,
            "resume": resume,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated_unix_s": round(time.time(), 3),
        }
        write_json(self.path / STATUS_NAME, status)

    def status(self) -> dict[str, Any] | None:
        """What `set_status` said last, or None."""
        path = self.path / STATUS_NAME
        if not path.is_file():
            return None
        status = read_json(path)
        return status if isinstance(status, dict) else None

    def close(self) -> None:
        """Close the metrics and give the lock back."""
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.release()


class Metrics:
    """metrics.jsonl: one JSON object a line, each with `step` and `kind`. Losing it never stops a run.

    `trouble` holds the first reason why lines could not be written, until somebody takes it.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self.trouble: str | None = None
        self._told = False
        self._fd = -1

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line. Numbers that are not finite are written as null."""
        if not self._writes:
            return
        data = (json.dumps(_finite(line), ensure_ascii=False) + "\n").encode()
        try:
            if self._fd >= 0 and os.fstat(self._fd).st_nlink == 0:
                self.close()
                self._complain(f"{self.path} was deleted while the run went on; a new one was started")
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._complain(f"cannot write {self.path}: {error.strerror}; training goes on without a complete log")

    def sync(self) -> None:
        """Make the lines durable; called before a checkpoint that stands for them."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._complain(f"cannot write {self.path}: {error.strerror}; training goes on without a complete log")

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def take_trouble(self) -> str | None:
        """What went wrong, once."""
        trouble, self.trouble = self.trouble, None
        return trouble

    def _complain(self, text: str) -> None:
        if not self._told:
            self._told = True
            self.trouble = text

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps beyond `step`, and torn or foreign ones, so that a resumed run logs each step once."""
        if not self._writes or not self.path.is_file():
            return
        self.close()
        lines = list(self.path.read_bytes().splitlines(keepends=True))
        kept = [raw for raw in lines if raw.endswith(b"\n") and _step_of(raw) is not None and (_step_of(raw) or 0) <= step]
        if kept != lines:
            with atomic_write(self.path) as file:
                file.writelines(kept)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines of the file, parsed."""
        if self.path.is_file():
            for raw in self.path.read_bytes().splitlines():
                if _step_of(raw) is not None:
                    yield json.loads(raw)


def _step_of(raw: bytes) -> int | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
