"""Dropout: what falls depends on seed, sample and place, and on nothing else."""

import math

import pytest
import torch

from llmctl.core.model.dropout import Dropout


def test_a_part_of_the_numbers_falls_and_the_mean_stays() -> None:
    x = torch.ones(4, 100, 64)
    dropped = Dropout(0.25, seed=1, samples=range(4))(x, 0)
    count = x.numel()
    assert abs(int((dropped == 0).sum()) - 0.25 * count) < 5 * math.sqrt(count * 0.25 * 0.75)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])


def test_it_is_the_same_in_any_batch_and_another_at_any_other_place() -> None:
    x = torch.randn(6, 33, 7)
    whole = Dropout(0.5, seed=3, samples=range(10, 16))(x, 2)
    parts = [Dropout(0.5, seed=3, samples=range(10 + start, 12 + start))(x[start : start + 2], 2) for start in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    alone = Dropout(0.5, seed=3, samples=[12])(torch.ones(1, 33, 7), 2)
    others = [
        Dropout(0.5, seed=3, samples=[13])(torch.ones(1, 33, 7), 2),
        Dropout(0.5, seed=3, samples=[12])(torch.ones(1, 33, 7), 1),
        Dropout(0.5, seed=4, samples=[12])(torch.ones(1, 33, 7), 2),
    ]
    for other in others:
        agree = float((alone == other).double().mean())
        assert abs(agree - 0.5) < 5 * math.sqrt(0.25 / alone.numel())  # as two fair coins do


def test_the_gradient_falls_where_the_numbers_fell() -> None:
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    dropout = Dropout(0.4, seed=0, samples=[5, 6])
    out = dropout(x, 3)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad * x, out)
