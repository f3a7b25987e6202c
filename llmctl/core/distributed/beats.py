"""Whether the other processes still work: each beats through the store, and one that waits listens. Knows no collective.

A collective that waits longer than its timeout gives up, so it must not span work whose length nobody knows, a save for
instance. Such work is waited for through the store, for as long as the others beat. Rank 0 listens to all, the others to
rank 0, which tells them when it has lost one.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch._C._distributed_c10d import Store  # what torch.distributed gives out, for the type checker

from llmctl.core.distributed.place import Place
from llmctl.core.errors import LostRankError, first_line

_PER_TIMEOUT = 5
"""So often, within the time that silence may take, a process beats and listens."""
_LOST = "lost"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.5

ResultT = TypeVar("ResultT")


def another_client(store: Store) -> Store:
    """The same store through a connection of its own: a client that waits for a key keeps all its other users waiting."""
    return cast(Store, cast(Any, store).clone())


class Beats:
    """This process's beats, and when it heard of the others last."""

    def __init__(self, store: Store, place: Place, *, timeout_s: float) -> None:
        self.every_s = timeout_s / _PER_TIMEOUT
        self._timeout_s, self._rank = timeout_s, place.rank
        self._others = list(range(1, place.size)) if place.is_main else [0]
        self._store = another_client(store)
        self._store.set_timeout(timedelta(seconds=timeout_s))
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._listened = 0.0
        self._failure: str | None = None

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Within it a thread beats and listens."""
        self._store.set(_beat_of(self._rank), "0")
        thread = threading.Thread(target=self._go, name="llmctl-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()

    def _go(self) -> None:
        count = 0
        try:
            while not self._stopped.wait(self.every_s):
                count += 1
                self._store.set(_beat_of(self._rank), str(count))
                self._listen()
        except RuntimeError as error:  # the store is gone or cut off; whoever waits asks `check`
            self._failure = first_line(error)

    def _listen(self) -> None:
        known = [rank for rank in self._others if rank in self._heard or self._store.check([_beat_of(rank)])]
        beats = self._store.multi_get([_beat_of(rank) for rank in known])
        now = self._listened = time.monotonic()
        for rank, beat in zip(known, beats, strict=True):
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = beat, now
        if self._rank != 0 and self._store.check([_LOST]):
            self._failure = self._store.get(_LOST).decode()
        elif silent := self._silent():
            self._store.set(_LOST, f"rank 0 lost rank {silent[0]}")

    def _silent(self) -> list[int]:
        """Those not heard of for too long, by the time when this process listened last: it may have been stopped itself."""
        return [rank for rank, (_, since) in dict(self._heard).items() if self._listened - since > self._timeout_s]

    def check(self) -> None:
        """Raise LostRankError when another process is lost; to be called again and again while waiting."""
        if self._failure is not None:
            raise LostRankError(f"rank {self._rank} lost contact with another rank ({self._failure}); go on with --resume")
        if silent := self._silent():
            raise LostRankError(f"rank {self._rank} has heard nothing of rank {silent[0]} for {self._timeout_s:g} s; go on with --resume")

    def value_of(self, store: Store, key: str) -> bytes:
        """What another process leaves under `key`, however long it works. Raises LostRankError when one is lost."""
        began = time.monotonic()
        while not store.check([key]):  # rather than the store's own waiting, which writes a warning to stderr when it gives up
            self.check()
            waited = time.monotonic() - began
            time.sleep(min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, waited / 10)))
        return store.get(key)

    def watched(self, work: Callable[[], ResultT]) -> ResultT:
        """`work`, whose own waiting has no end, in a thread, while this one listens. Raises LostRankError when a process is lost."""
        results: list[ResultT] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                with torch.no_grad():
                    results.append(work())
            except BaseException as error:  # raised below
                failures.append(error)

        thread = threading.Thread(target=run, name="llmctl-watched", daemon=True)
        thread.start()
        self.join(thread)
        if failures:
            raise failures[0]
        return results[0]

    def join(self, thread: threading.Thread) -> None:
        """Until `thread`, which works together with other processes, has ended. Raises LostRankError when one is lost."""
        while thread.is_alive():
            thread.join(self.every_s)
            if thread.is_alive():
                self.check()


def _beat_of(rank: int) -> str:
    return f"beat/{rank}"
