"""From one dial, the depth, to a whole architecture. Knows ModelConfig and sizes that work well; no torch, no family file.

The width follows the depth at a fixed aspect, as in nanochat (https://github.com/karpathy/nanochat), because the best
ratio of width to depth varies little with size (Kaplan et al. 2020, section 3.2).
"""

import math
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import UsageError

WIDTH_PER_LAYER = 64
HEAD_DIM = 64
TIED_UP_TO_WIDTH = 1024
"""Up to here the embeddings would be a large part of the model, so that input and output share them (as Qwen3 does)."""
RATE_AT_256 = 3e-3
SHAPES = ("qwen3", "llama", "gpt2")


def shape_for_depth(depth: int, vocab_size: int, max_positions: int, family: str = "qwen3") -> ModelConfig:
    """The architecture of `depth` layers, 64 * depth wide with heads of 64, as `family` builds its models.

    qwen3: norms on queries and keys, gated mlp of 3 widths. llama: gated mlp of 8/3 widths rounded up to 64. gpt2:
    LayerNorm, biases, learned positions, plain mlp of 4 widths. From 8 heads on, qwen3 and llama share a key-value head
    between two or more query heads. Raises UsageError for an unknown family or a depth below 1.
    """
    if depth < 1:
        raise UsageError(f"--depth: {depth} is out of range; it must be at least 1")
    width = WIDTH_PER_LAYER * depth
    heads = width // HEAD_DIM
    common: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": width, "num_layers": depth, "num_heads": heads, "head_dim": HEAD_DIM}
    if family == "gpt2":
        return ModelConfig(
            **common,
            num_kv_heads=heads,
            mlp_size=4 * width,
            max_positions=max_positions,
            activation="gelu_tanh",
            gated_mlp=False,
            norm="layer",
            norm_eps=1e-5,
            norm_bias=True,
            positions="learned",
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            scale_residual_init=True,
        )
    if family not in SHAPES:
        raise UsageError(f"--family: {family!r} is not one of {', '.join(SHAPES)}")
    return ModelConfig(
        **common,
        num_kv_heads=_shared_heads(heads),
        mlp_size=3 * width if family == "qwen3" else -(-8 * width // 3 // 64) * 64,
        max_positions=max_positions,
        norm_eps=1e-6 if family == "qwen3" else 1e-5,
        rope_theta=10_000.0,
        qk_norm=family == "qwen3",
        tie_embeddings=width <= TIED_UP_TO_WIDTH,
    )


def learning_rate_for_width(width: int) -> float:
    """AdamW's peak rate for a new model: it moves the embeddings, the head and the norms.

    It falls with the root of the width. Under muP the rate of the embeddings stays and that of the head falls with the width
    itself (Yang et al. 2022, table 8); where the two share a matrix it lies between, as nanochat has it. Muon's rate needs no
    rule: its steps have the same spectral norm at every width, times the root of rows over columns (Bernstein 2025).
    """
    return RATE_AT_256 * math.sqrt(256 / width)


def _shared_heads(heads: int) -> int:
    """Key-value heads: all of them in a small model, else the largest divisor that shares each between 2 heads or more."""
    if heads < 8:
        return heads
    return max(kv for kv in range(1, heads // 2 + 1) if heads % kv == 0)
