"""The number format that computes on a device."""

import pytest
import torch

from llmctl.core.model.device import compute_dtype


@pytest.mark.parametrize(
    ("instructions", "wanted"), [({"avx512_bf16": True, "avx2": True}, None), ({"avx512_bf16": False, "avx2": True}, torch.float32)]
)
def test_a_cpu_without_bf16_arithmetic_computes_in_float32(
    instructions: dict[str, bool], wanted: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert compute_dtype(None, torch.device("cpu")) == wanted
    assert compute_dtype(None, torch.device("cuda")) is None
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16
