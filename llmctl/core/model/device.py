"""Which device and which number format: the names that the flags use. Knows torch's devices; knows no model."""

import torch

from llmctl.core.errors import UsageError

_DTYPES = {
    "float32": torch.float32,
    "f32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "f16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """The device of `--device auto|cpu|cuda|mps`. Raises UsageError when it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if available[n])
    if not available[name]:
        raise UsageError(f"--device {name}: torch finds no such device here; use --device cpu")
    return torch.device(name)


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The number format of `--dtype` on `device`. Without a name: None, as stored, but float32 on a CPU that has no bf16
    arithmetic, since torch emulates it there at a small part of the speed of float32 (0.25 of it was measured)."""
    if name is not None:
        return _DTYPES[name]
    return None if multiplies_in_bf16(device) else torch.float32


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are not slower than in float32: accelerators, and CPUs with instructions for it.

    Asked of the CPU rather than timed: a busy machine would give one answer today and another tomorrow.
    """
    if device.type != "cpu":
        return True
    return any(value is True for name, value in torch.cpu.get_capabilities().items() if "bf16" in name)
