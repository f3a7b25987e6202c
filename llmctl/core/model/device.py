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


def dtype_named(name: str | None) -> torch.dtype | None:
    """The number format of `--dtype`; None (as stored) for None."""
    return None if name is None else _DTYPES[name]
