"""GPT-2 (Radford et al. 2019): LayerNorm, biases, absolute positions, plain mlp, matrices stored as (inputs, outputs)."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Family, Reader, Rule


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        read.refuse(key)
    read.refuse("scale_attn_weights", unless=True)
    hidden, heads = read.integer("n_embd", 768), read.integer("n_head", 12)
    if heads < 1 or hidden % heads:
        raise InputError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}")
    positions = read.text("llmctl_positions", "learned")
    if positions not in ("learned", "sinusoidal"):
        raise InputError(f"config.json: llmctl_positions is {positions!r}; learned or sinusoidal is wanted")
    return ModelConfig(
        vocab_size=read.integer("vocab_size", 50257),
        hidden_size=hidden,
        num_layers=read.integer("n_layer", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=read.integer("n_inner", 4 * hidden),
        max_positions=read.integer("n_positions", 1024),
        activation=read.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        positions="sinusoidal" if positions == "sinusoidal" else "learned",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_embeddings=read.flag("tie_word_embeddings", True),
        initializer_range=read.number("initializer_range", 0.02),
        scale_residual_init=True,
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    activations = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.mlp_size == 4 * config.hidden_size else config.mlp_size,
        "n_positions": config.max_positions,
        "activation_function": activations[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        # we train without dropout, and whoever goes on training with transformers should not get its default of 0.1
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        # a fixed table is a wpe like any other to transformers; this key tells us not to train it
        **({"llmctl_positions": "sinusoidal"} if config.positions == "sinusoidal" else {}),
    }


_H = "transformer.h.{i}"
_L = "layers.{i}"

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=(
        Rule("transformer.wte.weight", ("embed.weight",)),
        Rule("transformer.wpe.weight", ("positions.weight",)),
        Rule(f"{_H}.ln_1.weight", (f"{_L}.attn_norm.weight",)),
        Rule(f"{_H}.ln_1.bias", (f"{_L}.attn_norm.bias",)),
        Rule(f"{_H}.attn.c_attn.weight", (f"{_L}.attn.q.weight", f"{_L}.attn.k.weight", f"{_L}.attn.v.weight"), transposed=True),
        Rule(f"{_H}.attn.c_attn.bias", (f"{_L}.attn.q.bias", f"{_L}.attn.k.bias", f"{_L}.attn.v.bias")),
        Rule(f"{_H}.attn.c_proj.weight", (f"{_L}.attn.o.weight",), transposed=True),
        Rule(f"{_H}.attn.c_proj.bias", (f"{_L}.attn.o.bias",)),
        Rule(f"{_H}.ln_2.weight", (f"{_L}.mlp_norm.weight",)),
        Rule(f"{_H}.ln_2.bias", (f"{_L}.mlp_norm.bias",)),
        Rule(f"{_H}.mlp.c_fc.weight", (f"{_L}.mlp.up.weight",), transposed=True),
        Rule(f"{_H}.mlp.c_fc.bias", (f"{_L}.mlp.up.bias",)),
        Rule(f"{_H}.mlp.c_proj.weight", (f"{_L}.mlp.down.weight",), transposed=True),
        Rule(f"{_H}.mlp.c_proj.bias", (f"{_L}.mlp.down.bias",)),
        Rule("transformer.ln_f.weight", ("final_norm.weight",)),
        Rule("transformer.ln_f.bias", ("final_norm.bias",)),
        Rule("lm_head.weight", ("head.weight",)),
    ),
    trunk_prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
