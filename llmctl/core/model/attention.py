"""Attention over queries, keys and values that are already projected and rotated. Knows no weights and no positions.

Legend: B rows, T queries a row, K keys a row, H heads, Hkv key-value heads, D head size. This file is the seam for
other kernels: all of the decoder's attention passes through `attend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.core.model import causal_native
from llmctl.core.model.causal import causal_attention, suits


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees. Made once a call and shared by the layers.

    Without `query_positions`, queries and keys are the same tokens and each sees those before it and itself, within its
    document when `document_lengths` (one tuple a row, each adding up to T) is given. With `query_positions` (B, T), on
    the CPU, query t of row b sees the keys 0..query_positions[b, t].
    """

    query_positions: Tensor | None = None
    same_start: int | None = None
    """The position of the first query when the queries of all rows are consecutive from there on."""
    document_lengths: Sequence[Sequence[int]] | None = None
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
        """True where a query may look, (B or 1, 1, T, K); made once for the layers that share a window.

        Padding (position -1) looks at key 0, so that no row is empty.
        """
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            positions = torch.arange(num_queries)[None] if self.query_positions is None else self.query_positions.clamp(min=0)
            # on the device, so that positions travel there and not a mask of T * K
            keys, positions = torch.arange(num_keys, device=device), positions.to(device)[:, None, :, None]
            mask = keys <= positions
            if window is not None:
                mask &= keys > positions - window
            self._masks[key] = mask
        return self._masks[key]


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax attention. q (B, H, T, D), k and v (B, Hkv, K, D); returns (B, H, T, D).

    `window` limits a query to that many keys, its own included; `softcap` c makes the scores c * tanh(score / c).
    """
    if pattern.document_lengths is not None:
        return _attend_documents(q, k, v, pattern.document_lengths, scale=scale, window=window, softcap=softcap)
    num_queries, num_keys = q.shape[2], k.shape[2]
    windowed = window is not None and window < num_keys
    if pattern.query_positions is None or (pattern.same_start == 0 and num_queries == num_keys):
        if softcap is None and causal_native.suits(q, k, v):
            return causal_native.native_attention(q, k, v, scale=scale, window=window if windowed else None)
        if softcap is None and suits(q, k, window if windowed else None):
            return causal_attention(q, k, v, scale=scale, window=window if windowed else None)
        if not windowed and softcap is None:
            return _sdpa(q, k, v, None, causal=num_queries > 1, scale=scale)
        mask = pattern.mask(num_queries, num_keys, window, q.device)
    elif pattern.same_start is not None and num_queries == 1 and not windowed:
        mask = None
    else:
        mask = pattern.mask(num_queries, num_keys, window, q.device)
    if softcap is None:
        return _sdpa(q, k, v, mask, causal=False, scale=scale)
    return _explicit(q, k, v, mask, scale=scale, softcap=softcap)


def _attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Sequence[Sequence[int]],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One call a document: quadratic in a document's length, not in the row's, and with a backward on every device."""
    batch, heads, num_tokens, size = q.shape
    lengths = [length for row in document_lengths for length in row if length]

    # split's backward is one concatenation; the backward of a slice would make a full-size tensor for every document
    def documents(x: Tensor) -> tuple[Tensor, ...]:
        flat = x.transpose(1, 2).reshape(1, batch * num_tokens, x.shape[1], size)  # (1, B*T, H, D)
        return torch.split(flat.transpose(1, 2), lengths, dim=2)

    alone = Pattern()
    outputs = [
        attend(q_doc, k_doc, v_doc, alone, scale=scale, window=window, softcap=softcap)
        for q_doc, k_doc, v_doc in zip(documents(q), documents(k), documents(v), strict=True)
    ]
    joined = torch.cat([out.transpose(1, 2) for out in outputs], dim=1)  # (1, B*T, H, D)
    return joined.view(batch, num_tokens, heads, size).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float) -> Tensor:
    """The formula written out, for what SDPA cannot express: scores bounded by a tanh (Gemma 2)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-2, -1) * (scale / softcap))  # (B, H, T, K)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
