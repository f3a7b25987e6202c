"""The machine that trains: threads, memory allocator, matmul peak, memory in use. Knows torch; knows no model."""

import contextlib
import ctypes
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.core.memory import peak_bytes
from llmctl.core.model.device import multiplies_in_bf16

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_PEAK_BUDGET_S = 0.25


def prepare(*, threads: int | None, deterministic: bool = True) -> None:
    """Set up this process for training: threads, kernels that give the same bits each time, and the allocator."""
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling fresh memory would find reads of uninitialised memory, at the price of writing everything twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed pages instead of giving them back, since each step asks for the same ones again.

    Faulting pages in anew took up to a tenth of a step on two CPU cores. Elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - AttributeError on other C libraries
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of `--dtype auto|bf16|f32`: auto is bf16 on an accelerator and on CPUs that multiply in it."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "f32": torch.float32}[name]
    return torch.bfloat16 if multiplies_in_bf16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """ "bf16" or "f32", as the flag says it."""
    return {torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}[dtype]


def matmul_peak(dtype: torch.dtype, device: torch.device, *, budget_s: float = _PEAK_BUDGET_S) -> float:
    """FLOP/s of the best of several square matrix products within about `budget_s` seconds.

    The products are of 1,024 rows on a CPU and of 8,192 elsewhere; of fewer where two of those would not fit in the budget, as
    on a CPU that has no bf16 arithmetic and does it fifty times slower than float32.
    """
    largest = 1024 if device.type == "cpu" else 8192
    side = largest // 8
    while True:
        a, b, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
        _product_s(a, b, out)  # the first one makes room and chooses a kernel
        best, began = _product_s(a, b, out), time.perf_counter()
        if side == largest or 16 * best > budget_s:
            break
        side *= 2
    while time.perf_counter() - began < budget_s:
        best = min(best, _product_s(a, b, out))
    return 2.0 * side**3 / best


def _product_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of one matrix product."""
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    synchronize(a.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_total_bytes(device: torch.device) -> int | None:
    """Memory of the device, or None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory that this process has held until now: on a CUDA device that device's, else the process's."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes()


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader of a run's numbers wants to know of the machine and the versions; no names of hosts or people."""
    found = {
        "processor": _processor(),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": memory_total_bytes(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmctl": __version__,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "gpu_memory_bytes": memory_total_bytes(device), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    """The name that the processor gives itself."""
    with contextlib.suppress(OSError):
        if named := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.MULTILINE):
            return named[1].strip()
    return platform.processor() or platform.machine()
