"""Which of how many processes this one is, and what it owes to `--nproc` where that started it. Stdlib only."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHED = "LLMCTL_LAUNCHED"
"""Set by `--nproc` for the processes it starts: they end with it and leave their last line to it."""

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's agent, which is the one of `--nproc` too, for its processes."""

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torch's agent lets a process leave why it failed."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`, and number `local_rank` of the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws."""
        return self.rank == 0


ALONE = Place()


def place_of(environ: Mapping[str, str]) -> Place:
    """The place that torchrun, `--nproc` or a batch system has given this process; ALONE where none has.

    All of RANK, WORLD_SIZE and MASTER_ADDR must be there: one alone may be a left-over of something else.
    """
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and size.isdecimal() and "MASTER_ADDR" in environ):
        return ALONE
    local_rank, local_size = environ.get("LOCAL_RANK", ""), environ.get("LOCAL_WORLD_SIZE", "")
    return Place(
        int(rank),
        int(size),
        int(local_rank) if local_rank.isdecimal() else 0,
        int(local_size) if local_size.isdecimal() else 1,
    )


def follow_launcher() -> None:
    """Where `--nproc` started this process: get a SIGTERM when it dies, so that a killed launcher leaves no orphans (Linux)."""
    if LAUNCHED not in os.environ or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_last_words(message: str, *, exit_code: int, lost: bool) -> bool:
    """Give the launcher the line that says why this process ends; False where there is none, and the line is for stderr.

    `exit_code` is 128 and the number of the signal where one ends it; `lost` means that it ends because another one did.
    """
    file = os.environ.get(_ERROR_FILE)
    if LAUNCHED not in os.environ or not file:
        return False
    try:
        with open(file, "w", encoding="utf-8") as words:  # in a folder of the launcher's own, which reads it once we are gone
            json.dump({"message": message, "timestamp": 0, "llmctl": {"message": message, "exit_code": exit_code, "lost": lost}}, words)
    except OSError:
        return False
    return True
