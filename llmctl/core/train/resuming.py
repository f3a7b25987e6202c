"""The command that goes on with a run: it is told when one stops, and kept in status.json. Knows settings and launchers; no run."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from llmctl.core.config.fields import flag_of, options_of
from llmctl.core.distributed.place import LAUNCHED, TORCHRUN, place_of

_CARRIED = ("device", "threads", "mesh", "offload", "rank_timeout", "async_save")
"""Settings of an invocation that a run's stored config leaves out, and that the next one should have too."""


def resume_command(command: str, config: Any, environ: Mapping[str, str] = os.environ) -> str:
    """How `llmctl <command>` goes on with the run of `config`, in as many processes as now and started in the same way.

    A shell takes it as it is, but for the meeting point of several machines, which no process is told.
    """
    words = [command, "--out-dir", str(config.out_dir), "--resume"]
    for option in options_of(type(config)):
        value = getattr(config, option.name)
        if option.name in _CARRIED and value != option.default:
            words += [flag_of(option)] if value is True else [flag_of(option), f"{value:g}" if isinstance(value, float) else str(value)]
    place = place_of(environ)
    if LAUNCHED in environ:
        words += ["--nproc", str(place.size)]
    plain = " ".join(["llmctl", *map(shlex.quote, words)])
    if place.size == 1 or LAUNCHED in environ:
        return plain
    if TORCHRUN not in environ:
        return f"{plain}  # in {place.size} processes, started as before"
    num_nodes = place.size // place.local_size
    if num_nodes == 1:
        return f"torchrun --standalone --nproc-per-node {place.size} -m {plain}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    return f"torchrun --nnodes {num_nodes} --nproc-per-node {place.local_size} {meeting} -m {plain}  # on each machine"
