"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024): RMSNorm, rotary positions, gated mlp, grouped queries."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.errors import InputError
from llmctl.core.families.base import Family, Reader, Rule, activation_to_hf, rope_to_hf, rotary_dim


def read_common(
    hf: Mapping[str, Any],
    *,
    head_dim: int | None,
    kv_heads: int | None,
    norm_eps: float = 1e-6,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    max_positions: int = 2048,
    theta: float = 10_000.0,
    tied: bool = False,
    partial_rotary: bool = False,
    rope: tuple[float, RopeScaling | None, float] | None = None,
) -> dict[str, Any]:
    """The facts that Llama and the families after it write alike. `head_dim` None means hidden / heads.

    The keyword arguments are what a family's config leaves out, since they differ: `activation` is its key and its
    default. `rope` (theta, scaling, rotated share) is given where the config says it in a way of its own.
    """
    read = Reader(hf)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if head_dim is None and hf.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    size = read.integer("head_dim", hidden // max(heads, 1) if head_dim is None else head_dim)
    found_theta, scaling, share = read.rope(default_theta=theta) if rope is None else rope
    if share != 1.0 and not partial_rotary:
        raise InputError(f"config.json: partial_rotary_factor {share} is not supported for this model_type")
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.integer("num_key_value_heads", heads if kv_heads is None else kv_heads),
        "head_dim": size,
        "mlp_size": read.integer("intermediate_size"),
        "max_positions": read.integer("max_position_embeddings", max_positions),
        "activation": read.activation(*activation),
        "norm_eps": read.number("rms_norm_eps", norm_eps),
        "rope_theta": found_theta,
        "rope_scaling": scaling,
        "rotary_dim": rotary_dim(size, share),
        "tie_embeddings": read.flag("tie_word_embeddings", tied),
        "initializer_range": read.number("initializer_range", 0.02),
    }


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_common`."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_to_hf(config.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_to_hf(config),
        "attention_dropout": 0.0,
    }


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    read.refuse("pretraining_tp", unless=1)
    bias = read.flag("attention_bias", False)
    return ModelConfig(
        **read_common(hf, head_dim=None, kv_heads=None),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias", False),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


_T = "model.layers.{i}"
_L = "layers.{i}"


def llama_rules(**norms: str) -> tuple[Rule, ...]:
    """Llama's names, of which a family uses those that its facts ask for. `norms` are its layers' norms: theirs=ours."""
    return (
        Rule("model.embed_tokens.weight", ("embed.weight",)),
        *(Rule(f"{_T}.{theirs}.weight", (f"{_L}.{ours}.weight",)) for theirs, ours in norms.items()),
        *(
            Rule(f"{_T}.self_attn.{ours}_proj.{part}", (f"{_L}.attn.{ours}.{part}",))
            for ours in ("q", "k", "v", "o")
            for part in ("weight", "bias")
        ),
        Rule(f"{_T}.self_attn.q_norm.weight", (f"{_L}.attn.q_norm.weight",)),
        Rule(f"{_T}.self_attn.k_norm.weight", (f"{_L}.attn.k_norm.weight",)),
        *(
            Rule(f"{_T}.mlp.{ours}_proj.{part}", (f"{_L}.mlp.{ours}.{part}",))
            for ours in ("gate", "up", "down")
            for part in ("weight", "bias")
        ),
        Rule("model.norm.weight", ("final_norm.weight",)),
        Rule("lm_head.weight", ("head.weight",)),
    )


LLAMA_RULES = llama_rules(input_layernorm="attn_norm", post_attention_layernorm="mlp_norm")
SANDWICH_RULES = llama_rules(
    input_layernorm="attn_norm",
    post_attention_layernorm="attn_post_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_post_norm",
)
"""The names where what attention and mlp give is normed too (Gemma 2 and 3, OLMo 2)."""

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)
