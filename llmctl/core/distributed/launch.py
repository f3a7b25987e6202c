"""`--nproc`: several processes of one command on this machine, under torch's elastic agent. Knows processes; knows no command.

The agent is the one behind torchrun, so the processes see what they would see there. Two things differ: a signal is handed
on and the processes get all the time they need to save (torchrun kills them after 30 s), and exit codes are kept
(torchrun's is 1 whatever happened).
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from llmctl.core.distributed.place import LAUNCHED
from llmctl.core.errors import Interrupted, LlmctlError, LostRankError

_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_MONITOR_S = 0.1
_BY_SIGNAL = 128


@dataclass(frozen=True)
class LastWords:
    """How a process ended: its exit code (of a signal, 128 and more), its line for people, and whether it only followed another."""

    exit_code: int
    message: str
    lost: bool


class RankFailed(LlmctlError):
    """A process of the job failed; its own line and exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(command: Sequence[str], *, num_processes: int, threads: int | None) -> None:
    """Run `command` in `num_processes` processes of this machine until all have ended.

    `threads` of the CPU for each (default: an equal part of the cores). Raises Interrupted when they were ended by a
    signal, and RankFailed or LostRankError with the words and the exit code of the one that failed first.
    """
    environment = {LAUNCHED: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ or threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads or max(1, num_cores() // num_processes))
    with tempfile.TemporaryDirectory(prefix="llmctl-ranks-") as folder, _changed(environment), _quiet():
        parameters = RendezvousParameters(
            backend="c10d", endpoint="localhost:0", run_id=f"llmctl-{os.getpid()}", min_nodes=1, max_nodes=1, local_addr="127.0.0.1"
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=num_processes,
            entrypoint=sys.executable,
            args=("-m", "llmctl", *command),
            rdzv_handler=get_rendezvous_handler(parameters),
            max_restarts=0,
            monitor_interval=_MONITOR_S,
            local_addr="127.0.0.1",
        )
        agent = _Agent(spec, DefaultLogsSpecs(log_dir=folder))
        try:
            result = agent.run()
        except SignalException as error:  # in the moment between the agent's handlers and ours
            raise Interrupted("stopped before the ranks had started", signal_number=int(error.sigval)) from error
        finally:
            spec.rdzv_handler.shutdown()
        _conclude(result, {rank: _words_of(failure) for rank, failure in result.failures.items()})


class _Agent(LocalElasticAgent):
    """The local agent, with signals handed on to the processes rather than ending them after a delay."""

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        started = super()._start_workers(worker_group)

        def hand_on(number: int, _frame: FrameType | None) -> None:
            for pid in started.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        for number in _HANDED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, hand_on)
        return dict(started)


def _conclude(result: RunResult, words: Mapping[int, LastWords]) -> None:
    if not result.is_failed():
        return
    rank, first = _root_cause(words)
    if first.message and first.exit_code > _BY_SIGNAL:
        raise Interrupted(first.message, signal_number=first.exit_code - _BY_SIGNAL)
    if first.exit_code > _BY_SIGNAL:
        number = first.exit_code - _BY_SIGNAL
        name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
        hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
        raise LostRankError(f"rank {rank} was ended by signal {number} ({name}){hint}; the other ranks are stopped; go on with --resume")
    raise RankFailed(first.message or f"rank {rank} ended with exit code {first.exit_code}", exit_code=first.exit_code)


def _root_cause(words: Mapping[int, LastWords]) -> tuple[int, LastWords]:
    """Of those that failed: one that told a reason of its own, else one killed, else one that followed.

    The agent ends the others by SIGTERM once it has seen one fail, and counts them too: of those without a word, they come last.
    """

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        said = words[rank]
        return said.lost, not said.message, said.exit_code == _BY_SIGNAL + signal.SIGTERM, rank

    rank = min(words, key=order)
    return rank, words[rank]


def _words_of(failure: ProcessFailure) -> LastWords:
    said = failure.error_file_data.get("llmctl") if isinstance(failure.error_file_data, dict) else None
    if not isinstance(said, dict):
        return LastWords(failure.exitcode if failure.exitcode >= 0 else _BY_SIGNAL - failure.exitcode, "", lost=False)
    return LastWords(int(said["exit_code"]), str(said["message"]), lost=bool(said["lost"]))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _changed(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the agent's log, whose tables of failures say what our one line says."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
