"""How much memory is free, and how many tokens of a cache that is. Knows the machine; knows no text.

Free memory is what the system could give without swapping: a guess that is old in a moment, so half of it is used.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path

from llmctl.core.config.model import ModelConfig

_SHARE = 0.5
"""Of free memory; a growing cache is there twice while it is copied, and the model computes in some too."""
_NUMBER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
_CGROUP = Path("/sys/fs/cgroup")


def cache_token_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token takes, in all layers."""
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    scales = 2 * config.num_layers * config.num_kv_heads * 4 if dtype == "int8" else 0
    return int(numbers * _NUMBER_BYTES.get(dtype, 4.0)) + scales


def batch_tokens(token_bytes: int, device: str) -> int | None:
    """How many tokens of a cache free memory has room for, at least 1; None where free memory is not known."""
    free = free_bytes(device)
    return None if free is None else max(1, int(free * _SHARE) // token_bytes)


def free_bytes(device: str) -> int | None:
    """Bytes of memory that are free on "cpu", "cuda" or "mps", and within this process's limits; None where it is not known."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.startswith("mps"):
        import torch

        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    known = [value for value in (_of_system(), _of_cgroup(), _of_process()) if value is not None]
    return max(0, min(known)) if known else None


def _of_system() -> int | None:
    if sys.platform == "darwin":  # nothing tells what could be freed; the system holds little back for long
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_cgroup() -> int | None:
    """What a container's limit leaves; the pages of files that it could drop count as free."""
    with contextlib.suppress(OSError, ValueError):
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    return None


def _of_process() -> int | None:
    """What `ulimit -v` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):
        return limit - int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return None
