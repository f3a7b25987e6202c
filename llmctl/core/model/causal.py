"""Causal attention for training on a CPU: explicit matrix products and softmax by blocks of queries, with its own backward.

At contexts up to a few hundred tokens this is faster than `scaled_dot_product_attention` on a CPU, whose kernel is made for
long contexts (benchmarks/attention.py measures both and shows the crossover). It keeps the probabilities, B * H * T * T / 2
elements a layer, so it is used for short contexts only. The oracle in the tests is `scaled_dot_product_attention`.

Legend: N = rows * heads, T tokens, D head size, S the first and E the last-but-one query of a block.
"""

from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 512
"""The longest context at which the explicit form was measured to win, forward and backward together."""


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether this form should run: training on a CPU, queries and keys of the same few hundred tokens."""
    trains = torch.is_grad_enabled() and q.requires_grad
    return trains and q.device.type == "cpu" and q.dtype != torch.float64 and 1 < q.shape[2] == k.shape[2] <= MAX_TOKENS


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Softmax(scale * q k^T) v with token t seeing tokens 0..t. All (B, H, T, D), as is the result."""
    result: Tensor = _CausalAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return result


def _block_length(num_tokens: int) -> int:
    """Queries in a block: short ones skip more of the masked half, long ones make larger products."""
    return 64 if num_tokens <= 256 else 128


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape = q.shape
        q, k, v = (x.reshape(-1, *shape[2:]) for x in (q, k, v))  # (N, T, D)
        num_tokens, block = shape[2], _block_length(shape[2])
        hidden = torch.ones(block, block, dtype=torch.bool).triu(1)
        out = torch.empty_like(q)
        probabilities = []
        for start in range(0, num_tokens, block):
            end = min(start + block, num_tokens)
            scores = torch.bmm(q[:, start:end], k[:, :end].mT).mul_(scale)  # (N, E - S, E)
            scores[:, :, start:].masked_fill_(hidden[: end - start, : end - start], float("-inf"))
            p = torch.softmax(scores, -1)
            out[:, start:end] = torch.bmm(p, v[:, :end])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.shape, ctx.block = scale, shape, block
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        shape, block, scale = ctx.shape, ctx.block, ctx.scale
        grad_out = grad_outputs[0].reshape(q.shape)  # (N, T, D)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, p in enumerate(probabilities):
            start, end = index * block, min((index + 1) * block, shape[2])
            piece = grad_out[:, start:end]
            grad_p = torch.bmm(piece, v[:, :end].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(scale)
            grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end])
            grad_k[:, :end] += torch.bmm(grad_scores.mT, q[:, start:end])
            grad_v[:, :end] += torch.bmm(p.mT, piece)
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), None
