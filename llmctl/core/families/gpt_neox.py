"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): attention and mlp in parallel, a quarter of each head rotated."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Family, Reader, Rule, activation_to_hf, rope_to_hf, rotary_dim


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if heads < 1 or hidden % heads:
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    theta, scaling, share = read.rope(theta_key="rotary_emb_base", share_key="rotary_pct", default_share=0.25)
    bias = read.flag("attention_bias", True)
    return ModelConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=read.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        mlp_size=read.integer("intermediate_size"),
        max_positions=read.integer("max_position_embeddings", 2048),
        activation=read.activation("hidden_act", "gelu"),
        gated_mlp=False,
        norm="layer",
        norm_eps=read.number("layer_norm_eps", 1e-5),
        norm_bias=True,
        parallel_residual=read.flag("use_parallel_residual", True),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim(hidden // heads, share),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        tie_embeddings=read.flag("tie_word_embeddings", False),
        initializer_range=read.number("initializer_range", 0.02),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_to_hf(config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope_to_hf(config)},
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


_T, _L = "gpt_neox.layers.{i}", "layers.{i}"


def _pair(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"{ours}.weight",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))


GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=(
        Rule("gpt_neox.embed_in.weight", ("embed.weight",)),
        *_pair(f"{_T}.input_layernorm", f"{_L}.attn_norm"),
        *(
            Rule(f"{_T}.attention.query_key_value.{part}", tuple(f"{_L}.attn.{ours}.{part}" for ours in ("q", "k", "v")), by_head=True)
            for part in ("weight", "bias")
        ),
        *_pair(f"{_T}.attention.dense", f"{_L}.attn.o"),
        *_pair(f"{_T}.post_attention_layernorm", f"{_L}.mlp_norm"),
        *_pair(f"{_T}.mlp.dense_h_to_4h", f"{_L}.mlp.up"),
        *_pair(f"{_T}.mlp.dense_4h_to_h", f"{_L}.mlp.down"),
        *_pair("gpt_neox.final_layer_norm", "final_norm"),
        Rule("embed_out.weight", ("head.weight",)),
    ),
    trunk_prefix="gpt_neox.",
    head_names=("embed_out.weight", "lm_head.weight"),
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
