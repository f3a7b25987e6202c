"""What the processes of a job agree on: flags, sums, and what rank 0 did for all. Knows torch.distributed; knows no model.

Of a process alone every method is the identity, so that callers have one path. All ranks must call the same methods in
the same order. Waiting is of two kinds: in a step a rank waits `timeout_s` for the others and then gives up; while rank
0 works alone (a sample), or each does its part of something long (a save), they wait as long as it takes and listen for
each other's beats; see beats.py. A rank that dies is noticed at once, since its connections close.
"""

import contextlib
import copy
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store  # what torch.distributed gives out, for the type checker
from torch.distributed.rendezvous import rendezvous

from llmctl.core import errors
from llmctl.core.distributed.beats import Beats, another_client
from llmctl.core.distributed.place import ALONE, Place, place_of
from llmctl.core.errors import Interrupted, LlmctlError, LostRankError, UsageError

_PATIENCE = timedelta(minutes=30)
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "imed out", "timeout", "gloo", "NCCL", "store", "Socket")
"""Words in what torch.distributed says when another rank is gone or silent: gloo raises plain RuntimeErrors."""


ResultT = TypeVar("ResultT")


class Ranks:
    """The processes of a job. `place` is this one's.

    `peers` neighbours each take the same rows of a batch, since they share the layers of a model (tensor parallelism).
    """

    def __init__(
        self,
        place: Place = ALONE,
        *,
        patient: "dist.ProcessGroup | None" = None,
        timeout_s: float = 0.0,
        store: "Store | None" = None,
        beats: Beats | None = None,
    ) -> None:
        self.place = place
        self._timeout_s, self._store, self._beats = timeout_s, store, beats
        self._turns = itertools.count(1)
        self.patient = patient
        """The gloo group that waits as long as it takes; what uses it is `watched`."""
        self._everyone: dist.ProcessGroup | None = None
        self._peers = 1
        self._data: dist.ProcessGroup | None = None

    def with_peers(self, peers: int) -> "Ranks":
        """The same, with so many neighbours that take the same rows. All ranks call it."""
        if peers == 1 or self.size == 1:
            return self
        groups = [dist.new_group(list(range(first, self.size, peers)), timeout=self.timeout) for first in range(peers)]
        result = copy.copy(self)
        group = groups[self.rank % peers]
        assert isinstance(group, dist.ProcessGroup)
        result._peers, result._data = peers, group
        return result

    def apart(self) -> "Ranks":
        """The same ranks with groups and turns of their own, for a thread that works beside this one. All ranks call it."""
        if self.size == 1:
            return self
        assert self._store is not None
        result = copy.copy(self)
        result._turns = itertools.count(1)
        result._store = PrefixStore(f"apart/{next(self._turns)}", another_client(self._store))
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(group, dist.ProcessGroup)
        result.patient = result._everyone = result._data = group
        result._peers = 1
        return result

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws."""
        return self.place.is_main

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for another in a step."""
        return timedelta(seconds=self._timeout_s)

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Within the block, what torch.distributed raises when a rank is gone becomes a LostRankError."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)):
                raise LostRankError(
                    f"rank {self.rank} lost contact with another rank ({errors.first_line(error)});"
                    " see that one's error, then go on with --resume"
                ) from error
            raise

    @property
    def data_rank(self) -> int:
        """Which part of a batch this process takes, of `data_size`."""
        return self.rank // self._peers

    @property
    def data_size(self) -> int:
        """In how many parts a batch is shared out."""
        return self.size // self._peers

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of a batch, in place."""
        if self.data_size > 1:
            with self.contact():
                dist.all_reduce(tensor, group=self._data)
        return tensor

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            with self.contact():
                dist.all_reduce(tensor, group=self._everyone)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over the parts of a batch, in float64."""
        return number if self.data_size == 1 else float(self.sum(torch.tensor(number, dtype=torch.float64)))

    def greatest(self, number: int) -> int:
        """The greatest of the ranks' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        with self.contact():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._everyone)
        return int(tensor)

    def agreed(self, ask: Callable[[], int | None]) -> Callable[[], int | None]:
        """`ask`, such that all ranks get the same answer: a signal that came to one of them has come to all."""
        if self.size == 1:
            return ask
        return lambda: self.greatest(ask() or 0) or None

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, on all ranks; the others wait. It is something that JSON can hold.

        An LlmctlError of rank 0 is raised on all of them, so that all take the same turn.
        """
        if self.size == 1:
            return work()
        answer: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.is_main:
            try:
                answer = {"value": work()}
            except BaseException as error:
                failure, answer = error, _described(error)
        assert self._store is not None
        assert self._beats is not None
        key = f"turn/{next(self._turns)}"
        if self.is_main:
            with self.contact():
                self._store.set(key, json.dumps(answer))  # JSON rather than torch's object lists, which are pickles
        else:
            with self.contact():
                answer = json.loads(self._beats.value_of(self._store, key).decode())
        if failure is not None:
            raise failure
        if "error" in answer:
            raise _raised(answer)
        return answer.get("value")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on all of them; each is something that JSON can hold."""
        if self.size == 1:
            return [value]
        self.wait()
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        with self.contact():
            dist.all_gather(lengths, torch.tensor(len(data)), group=self._everyone)
            padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
            padded[: len(data)] = data
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self._everyone)
        return [json.loads(bytes(part[: int(length)].numpy()).decode()) for part, length in zip(parts, lengths, strict=True)]

    def wait(self) -> None:
        """Until all ranks are here, however long one of them takes."""
        if self.size == 1:
            return
        assert self._store is not None
        assert self._beats is not None
        key = f"here/{next(self._turns)}"
        with self.contact():
            if self._store.add(key, 1) == self.size:
                self._store.set(f"{key}/all", "")
            self._beats.value_of(self._store, f"{key}/all")

    def leave(self) -> None:
        """Until all ranks are here and have no more to ask of the store, which may end with one of them."""
        self.wait()
        with self.contact():
            dist.barrier(group=self.patient)

    def join(self, thread: threading.Thread) -> None:
        """Until `thread`, which works together with other ranks, has ended. Raises LostRankError when one of them is lost."""
        if self._beats is None:
            thread.join()
        else:
            self._beats.join(thread)

    def watched(self, work: Callable[[], ResultT]) -> ResultT:
        """`work` that all ranks do together through `patient`. Raises LostRankError when one of them is lost meanwhile."""
        if self._beats is None:
            return work()
        with self.contact():
            return self._beats.watched(work)

    def all_or_none(self, work: Callable[[], None], *, doing: str) -> None:
        """Do `work` on each rank; when it fails on one with an LlmctlError, raise a WriteError on all of them."""
        failure: LlmctlError | None = None
        try:
            work()
        except LlmctlError as error:
            failure = error
        self.wait()
        if self.greatest(0 if failure is None else 1) and failure is None:
            raise errors.WriteError(f"another rank failed at {doing}; see its error")
        if failure is not None:
            raise failure


def _described(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__ if isinstance(error, LlmctlError) else "LlmctlError"
    message = str(error) if isinstance(error, LlmctlError) else f"rank 0 failed: {type(error).__name__}: {error}"
    return {"error": kind, "message": message, "signal": getattr(error, "signal_number", None)}


def _raised(answer: dict[str, Any]) -> LlmctlError:
    if answer["error"] == "Interrupted":
        return Interrupted(answer["message"], signal_number=answer["signal"])
    kind = getattr(errors, answer["error"], LlmctlError)
    return kind(answer["message"]) if issubclass(kind, LlmctlError) else LlmctlError(answer["message"])


@contextlib.contextmanager
def joined(*, cuda: bool, timeout_s: float) -> Iterator[Ranks]:
    """The ranks of this job, from the environment; this process alone where there is no other.

    `cuda` gives each rank the GPU of its local number. Raises LostRankError when the others cannot be reached in time.
    All ranks leave the block together when it ends well or by a signal; when it fails, each leaves at once.
    """
    place = place_of(os.environ)
    if place.size == 1:
        yield Ranks()
        return
    if cuda and place.local_rank >= torch.cuda.device_count():
        raise UsageError(f"{place.local_size} processes on this machine, but {torch.cuda.device_count()} GPUs; one a GPU is wanted")
    if cuda:
        torch.cuda.set_device(place.local_rank)
    store, patient = _connect(place, cuda=cuda, timeout_s=timeout_s)
    beats = Beats(store, place, timeout_s=timeout_s)
    ranks = Ranks(place, patient=patient, timeout_s=timeout_s, store=store, beats=beats)
    with beats.going():
        try:
            yield ranks
        except Interrupted:  # which all have agreed on
            ranks.leave()
            raise
        ranks.leave()
    dist.destroy_process_group()


def _connect(place: Place, *, cuda: bool, timeout_s: float) -> "tuple[Store, dist.ProcessGroup]":
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    try:
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", rank=place.rank, world_size=place.size, timeout=timeout))
        store.set_timeout(timeout)
        group_store = PrefixStore("groups", store)
        dist.init_process_group(backend, store=group_store, rank=place.rank, world_size=place.size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise LlmctlError(
                f"rank {place.rank} of {place.size} cannot listen at {where} (MASTER_ADDR, MASTER_PORT): the port is taken,"
                " perhaps by another run; give a free one"
            ) from error
        raise LostRankError(
            f"rank {place.rank} of {place.size} cannot meet the others at {where} (MASTER_ADDR, MASTER_PORT)"
            f" within {timeout_s:g} s: {errors.first_line(error)}; is rank 0 up, the port free and let through?"
        ) from error
    assert isinstance(patient, dist.ProcessGroup)
    return PrefixStore("llmctl", store), patient
