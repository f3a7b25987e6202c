"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024): RMSNorm, rotary positions, gated mlp, grouped queries."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Family, Reader, Rule, activation_to_hf, rope_to_hf


def read_common(hf: Mapping[str, Any], *, head_dim: int | None, kv_heads: int | None) -> dict[str, Any]:
    """The facts that Llama and the families after it write alike. `head_dim` None means hidden / heads."""
    read = Reader(hf)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if head_dim is None and "head_dim" not in hf and (heads < 1 or hidden % heads):
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    theta, scaling, share = read.rope()
    if share != 1.0:
        raise InputError(f"config.json: partial_rotary_factor {share} is not supported for this model_type")
    return {
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.integer("num_key_value_heads", heads if kv_heads is None else kv_heads),
        "head_dim": read.integer("head_dim", hidden // max(heads, 1) if head_dim is None else head_dim),
        "mlp_size": read.integer("intermediate_size"),
        "max_positions": read.integer("max_position_embeddings", 2048),
        "activation": read.activation("hidden_act", "silu"),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": read.flag("tie_word_embeddings", False),
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

LLAMA_RULES = (
    Rule("model.embed_tokens.weight", ("embed.weight",)),
    Rule(f"{_T}.input_layernorm.weight", (f"{_L}.attn_norm.weight",)),
    *(
        Rule(f"{_T}.self_attn.{ours}_proj.{part}", (f"{_L}.attn.{ours}.{part}",))
        for ours in ("q", "k", "v", "o")
        for part in ("weight", "bias")
    ),
    Rule(f"{_T}.self_attn.q_norm.weight", (f"{_L}.attn.q_norm.weight",)),
    Rule(f"{_T}.self_attn.k_norm.weight", (f"{_L}.attn.k_norm.weight",)),
    Rule(f"{_T}.post_attention_layernorm.weight", (f"{_L}.mlp_norm.weight",)),
    *(Rule(f"{_T}.mlp.{ours}_proj.{part}", (f"{_L}.mlp.{ours}.{part}",)) for ours in ("gate", "up", "down") for part in ("weight", "bias")),
    Rule("model.norm.weight", ("final_norm.weight",)),
    Rule("lm_head.weight", ("head.weight",)),
)

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
