"""A checkpoint that a thread writes while training goes on. Knows threads; knows no file and no tensor."""

import threading
import time
from collections.abc import Callable


class Background:
    """One piece of work at a time, and its result."""

    def __init__(self) -> None:
        self.step: int | None = None
        """Of the checkpoint under way; None when there is none."""
        self.started = 0.0
        self._thread: threading.Thread | None = None
        self._num_bytes = 0
        self._failure: BaseException | None = None

    def begin(self, step: int, work: Callable[[], int] | None) -> None:
        """Start on the checkpoint of `step`; `work` writes it and gives its size (None on ranks that do not write)."""
        self.step, self.started, self._failure, self._num_bytes = step, time.perf_counter(), None, 0
        if work is not None:
            # a daemon: `wait` sees to it that the work is done, and where another rank is lost it may never be
            self._thread = threading.Thread(target=self._run, args=(work,), name="llmctl-save", daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[], int]) -> None:
        try:
            self._num_bytes = work()
        except BaseException as error:  # raised where the result is asked for
            self._failure = error

    def wait(self, join: Callable[[threading.Thread], None] = threading.Thread.join) -> None:
        """Until nothing is being written any more; `join` waits for a thread, and may raise instead."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            join(thread)

    def result(self, join: Callable[[threading.Thread], None] = threading.Thread.join) -> int:
        """Wait for the checkpoint; its size in bytes. Raises what went wrong."""
        self.wait(join)
        if self._failure is not None:
            raise self._failure
        return self._num_bytes
