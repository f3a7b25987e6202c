"""The residual blocks of the decoder: norms, attention with its projections, what is added to what. Reads facts from ModelConfig.

Legend: B rows, T tokens a row, C hidden size, H heads, Hkv key-value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.core.config.model import ModelConfig
from llmctl.core.model.attention import Pattern, attend
from llmctl.core.model.cache import FixedPlace, KVCache, Place
from llmctl.core.model.dropout import Dropout
from llmctl.core.model.kernels import RmsNorm, run_here
from llmctl.core.model.mlp import Mlp
from llmctl.core.model.moe import RoutedMlp
from llmctl.core.model.rope import rotate

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, (B or 1, 1, T, R/2) each."""


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension."""

    def __init__(self, size: int, config: ModelConfig, *, rms: bool | None = None) -> None:
        super().__init__()
        self._rms = config.norm == "rms" if rms is None else rms
        self._eps = config.norm_eps
        self._plus_one = config.norm_plus_one and self._rms
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.norm_bias and not self._rms else None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the size; the same shape comes out."""
        if self._rms:
            if self._plus_one:
                # in float32 throughout, as the reference: 1 + weight has too few digits left in bf16
                return _rms_norm(x.float() if x.dtype.itemsize < 4 else x, 1.0 + self.weight.to(_wide(x)), self._eps).to(x.dtype)
            return _rms_norm(x, self.weight, self._eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if run_here(x):
        normed: Tensor = RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention with its four projections."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._layer, self._head_dim, self._whole_norm = layer, config.head_dim, config.qk_norm_whole
        self._scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self._window = config.window(layer)
        self._softcap = config.attention_softcap
        self.q = nn.Linear(config.hidden_size, config.query_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.kv_size, bias=config.qkv_bias)
        self.o = nn.Linear(config.query_size, config.hidden_size, bias=config.attention_out_bias)
        sizes = (config.query_size, config.kv_size) if config.qk_norm_whole else (config.head_dim, config.head_dim)
        normed = config.qk_norm or config.qk_norm_whole
        self.q_norm = Norm(sizes[0], config, rms=True) if normed else None
        self.k_norm = Norm(sizes[1], config, rms=True) if normed else None

    def forward(
        self, x: Tensor, angles: Angles | None, pattern: Pattern, cache: KVCache | None, place: Place | FixedPlace | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). `angles` None means that this layer does not rotate."""
        batch, num_tokens, _ = x.shape
        q, k = self.q(x), self.k(x)  # (B, T, H * D), (B, T, Hkv * D)
        if self._whole_norm and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, num_tokens, -1, self._head_dim)  # (B, T, H, D)
        k = k.view(batch, num_tokens, -1, self._head_dim)  # (B, T, Hkv, D)
        v = self.v(x).view(batch, num_tokens, -1, self._head_dim).transpose(1, 2)
        if not self._whole_norm and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, Hkv, T, D)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None and place is not None:
            k, v = cache.write(self._layer, place, k, v)  # (B, Hkv, K, D)
        out = attend(q, k, v, pattern, scale=self._scale, window=self._window, softcap=self._softcap)
        result: Tensor = self.o(out.transpose(1, 2).reshape(batch, num_tokens, -1))
        return result


class Layer(nn.Module):
    """One residual block, in the four arrangements that there are.

    Before (most): x + attention(norm(x)), then x + mlp(norm(x)). After (OLMo 2): x + norm(attention(x)). Both (Gemma 2):
    x + norm(attention(norm(x))). In parallel (GPT-NeoX): x + attention(norm(x)) + mlp(norm'(x)).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._multiplier, self._parallel, self._number = config.residual_multiplier, config.parallel_residual, layer
        self.attn_norm = Norm(config.hidden_size, config) if config.pre_norms else None
        self.attn = Attention(config, layer)
        self.attn_post_norm = Norm(config.hidden_size, config) if config.post_norms else None
        self.mlp_norm = Norm(config.hidden_size, config) if config.pre_norms else None
        self.mlp = RoutedMlp(config) if config.routes(layer) else Mlp(config)
        self.mlp_post_norm = Norm(config.hidden_size, config) if config.post_norms else None

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        pattern: Pattern,
        cache: KVCache | None = None,
        place: Place | FixedPlace | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). `dropout` falls on what attention and feed-forward add."""
        attended = self.attn(_through(self.attn_norm, x), angles, pattern, cache, place)
        attended = _through(self.attn_post_norm, attended)
        if dropout is not None:
            attended = dropout(attended, 2 * self._number)
        after = self._add(x, attended)
        inner = _through(self.mlp_post_norm, self.mlp(_through(self.mlp_norm, x if self._parallel else after)))
        if dropout is not None:
            inner = dropout(inner, 2 * self._number + 1)
        return self._add(after, inner)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self._multiplier == 1.0 else x + y * self._multiplier


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    """The norm of x, or x where there is no norm."""
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed
