"""The memory of this process as the system counts it. Knows nothing of what fills it."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most memory that this process has held at once.

    Not getrusage(2)'s ru_maxrss where Linux has a better count: that one begins with the peak of the process that started this.
    """
    try:
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
