"""Causal attention for training on a CPU: explicit matrix products and softmax by blocks of queries, with its own backward.

At contexts of a few hundred tokens this is faster than `scaled_dot_product_attention` on a CPU, whose kernel is made for
long contexts (benchmarks/attention.py measures both and shows the crossover), and with a window it skips what no query
sees, where that kernel computes the whole square. It keeps the probabilities, B * H * T * T / 2 elements a layer, so it is
used for short contexts and windows only. The oracle in the tests is `scaled_dot_product_attention`. In float32 causal_native.py
goes before it where it runs.

Legend: B rows, H heads, Hkv key-value heads, G = H / Hkv queries that share a key, N = B * Hkv, T tokens, D head size; a
block has the queries S..E-1, which see the keys F..E-1.
"""

from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 512
MIN_TOKENS = {torch.float32: 256, torch.bfloat16: 96}
"""The contexts from which on the explicit form is used, forward and backward measured together: in float32 it lost at 64 and 128
tokens on an AMD Zen 3, and at 64 on an Intel core, and was level or won from 256 on."""


def trains_here(q: Tensor) -> bool:
    """Whether a gradient of the queries will be asked for, outside of torch.compile, which makes kernels of its own."""
    return torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling()


def suits(q: Tensor, k: Tensor, window: int | None = None) -> bool:
    """Whether this form should run: training on a CPU, queries and keys of the same few hundred tokens, or a short window."""
    num_tokens = q.shape[2]
    if not trains_here(q) or q.device.type != "cpu" or q.dtype not in MIN_TOKENS or num_tokens != k.shape[2]:
        return False
    return MIN_TOKENS[q.dtype] <= num_tokens <= MAX_TOKENS or (window is not None and window <= MAX_TOKENS < num_tokens)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Softmax(scale * q k^T) v with token t seeing tokens 0..t, or the last `window` of them.

    q (B, H, T, D), k and v (B, Hkv, T, D); the result is (B, H, T, D).
    """
    result: Tensor = _CausalAttention.apply(q, k, v, scale, window)  # type: ignore[no-untyped-call]
    return result


def _blocks(num_tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key F, first query S, end E) of each block."""
    length = 64 if num_tokens <= 256 else 128  # short blocks skip more of the masked half, long ones make larger products
    return [(0 if window is None else max(0, s - window + 1), s, min(s + length, num_tokens)) for s in range(0, num_tokens, length)]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        rows, heads, num_tokens, size = q.shape
        shared = k.shape[1]
        q = (q * scale).reshape(rows * shared, heads // shared, num_tokens, size)  # (N, G, T, D)
        k, v = (x.reshape(rows * shared, num_tokens, size) for x in (k, v))  # (N, T, D)
        # in the layout that the projection after it reads, so that nothing is transposed once more
        out = q.new_empty(rows, num_tokens, heads, size).transpose(1, 2)  # (B, H, T, D)
        probabilities = []
        for first, start, end in _blocks(num_tokens, window):
            piece = q[:, :, start:end].flatten(1, 2)  # (N, G * (E - S), D)
            scores = torch.bmm(piece, k[:, first:end].mT)  # (N, G * (E - S), E - F)
            _hide(scores.view(len(q), -1, end - start, end - first), first, start, end, window)
            p = torch.softmax(scores, -1)
            out[:, :, start:end] = torch.bmm(p, v[:, first:end]).view(rows, heads, end - start, size)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        rows, heads, num_tokens, size = grad_outputs[0].shape
        grad_out = grad_outputs[0].reshape(q.shape)  # (N, G, T, D)
        grad_q = q.new_empty(rows, num_tokens, heads, size).transpose(1, 2)  # (B, H, T, D)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for (first, start, end), p in zip(_blocks(num_tokens, ctx.window), probabilities, strict=True):
            piece = grad_out[:, :, start:end].flatten(1, 2)  # (N, G * (E - S), D)
            grad_p = torch.bmm(piece, v[:, first:end].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            part = torch.bmm(grad_scores, k[:, first:end]).mul_(ctx.scale)
            grad_q[:, :, start:end] = part.view(rows, heads, end - start, size)
            grad_k[:, first:end] += torch.bmm(grad_scores.mT, q[:, :, start:end].flatten(1, 2))
            grad_v[:, first:end] += torch.bmm(p.mT, piece)
        shape = (rows, -1, num_tokens, size)
        return grad_q, grad_k.view(shape), grad_v.view(shape), None, None


def _hide(scores: Tensor, first: int, start: int, end: int, window: int | None) -> None:
    """Minus infinity where a query may not look, in `scores` (N, G, E - S, E - F). Added: `masked_fill_` takes 5 times as long."""
    queries = torch.arange(start, end)[:, None]
    scores[..., start - first :] += _minus_infinity(torch.arange(start, end) > queries, scores.dtype)
    if window is not None and end - window > first:
        keys = torch.arange(first, end - window)
        scores[..., : len(keys)] += _minus_infinity(keys <= queries - window, scores.dtype)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
