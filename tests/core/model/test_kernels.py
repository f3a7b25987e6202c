"""The CPU's training kernels against the plain formulas, differentiated by autograd in float64."""

import pytest
import torch
from torch.nn import functional as F

from llmctl.core.model.kernels import Lookup, RmsNorm, Rotate
from llmctl.core.model.rope import rotate

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 5, 64), (2, 700, 3, 16)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=random) * 3 + 1).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=random).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=random).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    wanted = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-2)
    found = RmsNorm.apply(x, weight, 1e-2)
    assert found.dtype == dtype
    assert error(found.detach(), wanted.detach()) < TOLERANCE[dtype]
    gradients = torch.autograd.grad(found, (x, weight), grad)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert ours.dtype == dtype
        assert error(ours, theirs) < 3 * TOLERANCE[dtype]


def test_rms_norm_of_a_frozen_weight_and_of_a_transposed_input() -> None:
    x = torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(4)
    (ours,) = torch.autograd.grad(RmsNorm.apply(x.transpose(0, 2), weight, 1e-6).pow(3).sum(), x)
    (theirs,) = torch.autograd.grad(F.rms_norm(x.transpose(0, 2), (4,), weight, 1e-6).pow(3).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rotated", [2, 6, 12])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(rows: int, rotated: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 12).to(dtype).transpose(1, 2).requires_grad_()  # (B, H, T, D), as the decoder makes it
    angles = torch.rand(rows, 1, 5, rotated // 2) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    grad = torch.randn(2, 3, 5, 12).to(dtype)
    with torch.no_grad():
        wanted = rotate(x.detach().double(), cos.double(), sin.double())
        back = rotate(grad.double(), cos.double(), -sin.double())
    found = Rotate.apply(x, cos, sin)
    assert error(found.detach(), wanted) < TOLERANCE[dtype]
    assert error(torch.autograd.grad(found, x, grad)[0], back) < TOLERANCE[dtype]


def test_the_gradient_of_a_frequent_token_keeps_growing_in_bf16() -> None:
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    tokens = torch.tensor([[0, 1] * 2000, [2, 0] * 2000])
    grad = torch.rand(2, 4000, 8).bfloat16()
    found = Lookup.apply(tokens, weight)
    assert torch.equal(found, F.embedding(tokens, weight))
    (ours,) = torch.autograd.grad(found, weight, grad)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.embedding(tokens, exact), exact, grad.double())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), wanted, rtol=1 / 256, atol=0)
