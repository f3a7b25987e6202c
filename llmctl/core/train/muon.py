"""Muon, batched over matrices of one shape. Knows stacks of matrices; knows no model.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon does one matrix at a time, which at small
sizes spends most of its time on launching operations; stacks of equal shapes go through batched products instead.

Shapes: N matrices, R rows, C columns.
"""

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic, chosen for the largest slope at 0, not for convergence to exactly 1."""

_ITERATIONS = 5
_LONG = 2
"""Columns a row from which on the Gram matrix takes fewer operations (the two meet at 1.5)."""
_EPS = 1e-7


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Near-orthogonal factors of a stack (N, R, C): U S' V^T with singular values S' within about 0.5 to 1.5.

    Newton-Schulz iteration in `dtype`; the result has that dtype.
    """
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT  # (N, min(R, C), max(R, C))
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)).to(dtype)
    long = x.size(-1) >= _LONG * x.size(-2) and dtype.itemsize >= 4  # the Gram matrix squares errors: too coarse in bf16
    x = _by_gram(x) if long else _by_steps(x)
    return x if wide else x.mT


def _by_steps(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)  # (N, r, r), symmetric
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same on the Gram matrix: each step multiplies x from the left by a polynomial of it, and these commute.

    2 r^2 c multiplications instead of 10 for a long x (N, r, c), and 17 r^3 instead of 5: half the time at c = 4 r.
    """
    a, b, c = COEFFICIENTS
    gram, product = torch.bmm(x, x.mT), None  # (N, r, r), symmetric
    for number in range(_ITERATIONS):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        product = poly if product is None else torch.bmm(poly, product)
        if number < _ITERATIONS - 1:
            gram = torch.bmm(torch.bmm(poly, gram), poly)
    assert product is not None
    return torch.bmm(product, x)


@torch.no_grad()
def muon_step(
    weights: Tensor,
    gradients: Tensor,
    momentum_buffers: Tensor,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One Nesterov step on a stack of matrices (N, R, C), in place on `weights` and `momentum_buffers`.

    `gradients` are scratch afterwards. Equal to torch.optim.Muon with adjust_lr_fn="original" up to the rounding of `dtype`.
    """
    momentum_buffers.lerp_(gradients, 1.0 - momentum)
    update = orthogonalize(gradients.lerp_(momentum_buffers, momentum), dtype=dtype)
    rows, columns = weights.shape[-2:]
    weights.mul_(1.0 - learning_rate * weight_decay)
    weights.add_(update, alpha=-learning_rate * math.sqrt(max(1.0, rows / columns)))
