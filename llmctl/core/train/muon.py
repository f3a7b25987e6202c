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
_EPS = 1e-7


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Near-orthogonal factors of a stack (N, R, C): U S' V^T with singular values S' within about 0.5 to 1.5.

    Newton-Schulz iteration in `dtype`; the result has that dtype.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT  # (N, min(R, C), max(R, C))
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)  # (N, r, r), symmetric
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x if wide else x.mT


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
