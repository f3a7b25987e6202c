"""Waiting for what another process does, by conditions rather than by times. Knows Linux's /proc, and does without."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 240.0
"""More than anything takes on a machine that is busy with other work."""


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[Any]") -> None:
    """Until `condition` holds; fails with what `process` said if it ends before."""
    ends = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.01)


def catches(process: "subprocess.Popen[Any]", number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal. Python itself has one for SIGINT alone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except FileNotFoundError:  # macOS
        time.sleep(2)
        return True
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
