"""The matmul peak that a plan is made with: the machine's rate, found without waiting for a product that is slow here."""

import pytest
import torch

from llmctl.core.train import machine


@pytest.mark.parametrize(("flops", "side"), [(1e12, 1024), (1e9, 256), (1e6, 128)])
def test_the_peak_is_found_on_a_size_that_fits_in_the_budget(monkeypatch: pytest.MonkeyPatch, flops: float, side: int) -> None:
    sides = []

    def product_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
        assert a.shape == b.shape == out.shape
        sides.append(len(a))
        return 2 * len(a) ** 3 / flops

    monkeypatch.setattr(machine, "_product_s", product_s)
    assert machine.matmul_peak(torch.float32, torch.device("cpu"), budget_s=0.25) == pytest.approx(flops)
    assert max(sides) == side
    assert sides.count(side) > 2, "measured again where it stayed"
