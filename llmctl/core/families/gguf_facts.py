"""The facts of each architecture of GGUF: metadata to ModelConfig, and what it writes beyond the keys that all have. No torch.

The keys and what stands in for those that a file lacks are llama.cpp's, of src/models/*.cpp and conversion/*.py.
"""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import Experts, ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Shape, inverse, one_window
from llmctl.core.families.gguf_metadata import Metadata
from llmctl.core.families.gguf_names import HEAD
from llmctl.core.families.gguf_rope import scaling_of_keys

Shapes = Mapping[str, Shape]
_WINDOW = "attention.sliding_window"


def common_keys(config: ModelConfig) -> dict[str, Any]:
    """What every architecture has, below its name."""
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        f"attention.layer_norm_{'rms_' if config.norm == 'rms' else ''}epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.positions == "rope":
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.rotary_size,
            "rope.freq_base": config.rope_theta,
        }
    return keys


def _sizes(meta: Metadata, vocab_size: int) -> dict[str, Any]:
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_layers": meta.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": meta.integer("attention.head_count_kv", heads),
        "mlp_size": meta.integer("feed_forward_length"),
        "max_positions": meta.integer("context_length"),
    }


def _rotary(meta: Metadata, shapes: Shapes, vocab_size: int, *, partial: bool = False) -> dict[str, Any]:
    """What the architectures with rotary positions have in common; `partial` says that a part of each head may be rotated."""
    sizes = _sizes(meta, vocab_size)
    head_dim = meta.integer("attention.key_length", sizes["hidden_size"] // max(sizes["num_heads"], 1))
    rotated = meta.integer("rope.dimension_count", head_dim)
    if meta.integer("attention.value_length", head_dim) != head_dim or (rotated != head_dim and not partial):
        raise InputError("GGUF metadata: heads whose keys, values and rotated part differ in size are not supported")
    return {
        **sizes,
        "head_dim": head_dim,
        "rotary_dim": None if rotated == head_dim else rotated,
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": meta.positive("rope.freq_base", 10_000.0),
        "rope_scaling": scaling_of_keys(meta),
        "tie_embeddings": HEAD not in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "attention_out_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


def no_keys(_: ModelConfig) -> dict[str, Any]:
    """None beyond the common ones."""
    return {}


def llama(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Llama's and Mistral's."""
    return ModelConfig(**_rotary(meta, shapes, vocab_size))


def mixtral(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Llama's with experts."""
    common = _rotary(meta, shapes, vocab_size)
    return ModelConfig(**common, experts=_experts(meta, common["num_layers"], mlp_size=common["mlp_size"]))


def qwen2(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Qwen2's, whose biases the tensors tell."""
    return ModelConfig(**_rotary(meta, shapes, vocab_size))


def qwen3(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Qwen3's."""
    return ModelConfig(**_rotary(meta, shapes, vocab_size), qk_norm=True)


def qwen3_moe(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Qwen3's with experts."""
    common = _rotary(meta, shapes, vocab_size)
    experts = _experts(meta, common["num_layers"], mlp_size=meta.integer("expert_feed_forward_length"))
    return ModelConfig(**common, qk_norm=True, experts=experts)


def _experts(meta: Metadata, num_layers: int, *, mlp_size: int) -> Experts:
    """Routed in every layer, weights divided by their sum, as llama.cpp computes both architectures."""
    return Experts(
        num_experts=meta.integer("expert_count"),
        num_active=meta.integer("expert_used_count"),
        mlp_size=mlp_size,
        normalised=True,
        layers=tuple(True for _ in meta.layers(num_layers)),
    )


def experts_keys(config: ModelConfig) -> dict[str, Any]:
    """The counts of experts."""
    if config.experts is None:
        return {}
    return {
        "expert_count": config.experts.num_experts,
        "expert_used_count": config.experts.num_active,
        "expert_feed_forward_length": config.experts.mlp_size,
    }


def granite(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Llama's with four multipliers, of which the last divides."""
    common = _rotary(meta, shapes, vocab_size)
    scale = meta.number("attention.scale", 0.0)
    return ModelConfig(
        **common,
        attention_scale=scale if scale > 0 else None,
        embedding_multiplier=meta.positive("embedding_scale", 1.0),
        residual_multiplier=meta.positive("residual_scale", 1.0),
        logit_multiplier=meta.positive("logit_scale", 1.0) ** -1.0,
    )


def granite_keys(config: ModelConfig) -> dict[str, Any]:
    """The multipliers."""
    return {
        "attention.scale": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": inverse(config.logit_multiplier, -1.0),
    }


def smollm3(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Llama's; no key tells that every fourth layer does not rotate, llama.cpp has it built in."""
    common = _rotary(meta, shapes, vocab_size)
    return ModelConfig(**common, rope_layers=tuple((i + 1) % 4 != 0 for i in meta.layers(common["num_layers"])))


def olmo2(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """OLMo 2's. OLMo 3 is of the same architecture there, and has windows."""
    if meta.integer(_WINDOW, 0) > 0:
        raise InputError("GGUF metadata: an olmo2 with sliding windows is an OLMo 3, which is not supported")
    return ModelConfig(**_rotary(meta, shapes, vocab_size), pre_norms=False, post_norms=True, qk_norm_whole=True)


def phi3(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Phi-3's and Phi-4's; a window of 0 is none."""
    common = _rotary(meta, shapes, vocab_size, partial=True)
    window = meta.integer(_WINDOW, 0)
    return ModelConfig(**common, windows=tuple(window for _ in meta.layers(common["num_layers"])) if window > 0 else None)


def phi3_keys(config: ModelConfig) -> dict[str, Any]:
    """The window; llama.cpp asks for the original length also where nothing is scaled."""
    return {_WINDOW: one_window(config) or 0, "rope.scaling.original_context_length": config.max_positions}


def _gemma_common(meta: Metadata, shapes: Shapes, vocab_size: int) -> dict[str, Any]:
    common = _rotary(meta, shapes, vocab_size)
    multiplier = max(common["hidden_size"], 0) ** 0.5
    return {**common, "activation": "gelu_tanh", "norm_plus_one": True, "embedding_multiplier": multiplier}


def gemma(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """The first Gemma's."""
    return ModelConfig(**_gemma_common(meta, shapes, vocab_size))


def gemma2(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Gemma 2's: every second layer with a window, soft-caps."""
    common = _gemma_common(meta, shapes, vocab_size)
    window = meta.integer(_WINDOW, 4096)
    return ModelConfig(
        **common,
        post_norms=True,
        windows=tuple(window if flag else None for flag in meta.windowed(common["num_layers"], period=2)),
        attention_scale=_gemma_scale(common, layers_of_27b=46),
        attention_softcap=meta.positive("attn_logit_softcapping", 50.0),
        logit_softcap=meta.positive("final_logit_softcapping", 30.0),
    )


def gemma3(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """Gemma 3's: all but every sixth layer with a window and a rope base of its own."""
    common = _gemma_common(meta, shapes, vocab_size)
    window, softcap = meta.integer(_WINDOW, 0), meta.number("final_logit_softcapping", 0.0)
    flags = meta.windowed(common["num_layers"], period=6)
    return ModelConfig(
        **{**common, "rope_theta": meta.positive("rope.freq_base", 1e6)},
        post_norms=True,
        qk_norm=True,
        windows=tuple(window if flag else None for flag in flags) if window > 0 and any(flags) else None,
        local_rope_theta=meta.positive("rope.freq_base_swa", 10_000.0),
        attention_scale=_gemma_scale(common, layers_of_27b=62),
        logit_softcap=softcap if softcap > 0 else None,
    )


def _gemma_scale(common: Mapping[str, Any], *, layers_of_27b: int) -> float:
    """The file does not hold query_pre_attn_scalar: llama.cpp tells the 27B models, which have one of their own, by their depth."""
    own = common["num_layers"] == layers_of_27b and common["num_heads"] > 0
    scalar = common["hidden_size"] / common["num_heads"] if own else common["head_dim"]
    return float(scalar**-0.5) if scalar > 0 else 1.0


def gemma2_keys(config: ModelConfig) -> dict[str, Any]:
    """The window, its pattern where it is not the usual one, and soft-caps."""
    return {**_window_keys(config, period=2), **_softcap_keys(config)}


def gemma3_keys(config: ModelConfig) -> dict[str, Any]:
    """As Gemma 2's, and the second rope base."""
    local = {} if config.local_rope_theta is None else {"rope.freq_base_swa": config.local_rope_theta}
    return {**_window_keys(config, period=6), **_softcap_keys(config), **local}


def _window_keys(config: ModelConfig, *, period: int) -> dict[str, Any]:
    if config.windows is None:
        return {}
    flags = [window is not None for window in config.windows]
    usual = flags == [i % period < period - 1 for i in range(config.num_layers)]
    return {_WINDOW: one_window(config), **({} if usual else {f"{_WINDOW}_pattern": flags})}


def _softcap_keys(config: ModelConfig) -> dict[str, Any]:
    keys = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap}
    return {key: value for key, value in keys.items() if value is not None}


def gpt_neox(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """GPT-NeoX's and Pythia's. No key holds the activation: it is Pythia's exact GELU, which llama.cpp approximates."""
    common = _rotary(meta, shapes, vocab_size, partial=True)
    return ModelConfig(**{**common, **_plain(meta)}, activation="gelu", parallel_residual=meta.flag("use_parallel_residual", True))


def gpt_neox_keys(config: ModelConfig) -> dict[str, Any]:
    """How attention and mlp are joined."""
    return {"use_parallel_residual": config.parallel_residual}


def gpt2(meta: Metadata, shapes: Shapes, vocab_size: int) -> ModelConfig:
    """GPT-2's, whose positions are a table."""
    sizes = _sizes(meta, vocab_size)
    return ModelConfig(
        **sizes,
        **_plain(meta),
        head_dim=sizes["hidden_size"] // max(sizes["num_heads"], 1),
        activation="gelu_tanh",
        positions="learned",
        tie_embeddings=HEAD not in shapes,
    )


def _plain(meta: Metadata) -> dict[str, Any]:
    """LayerNorm, an mlp without a gate, biases everywhere."""
    biases = dict.fromkeys(("norm_bias", "qkv_bias", "attention_out_bias", "mlp_bias"), True)
    return {"gated_mlp": False, "norm": "layer", "norm_eps": meta.number("attention.layer_norm_epsilon", 1e-5), **biases}
