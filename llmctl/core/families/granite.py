"""Granite 3 (Granite Team 2024): Llama with four multipliers, on embeddings, attention scores, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.families.base import Family, Reader, inverse
from llmctl.core.families.llama import LLAMA_RULES, read_common, write_common


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    bias = read.flag("attention_bias", False)
    return ModelConfig(
        **read_common(hf, head_dim=None, kv_heads=None),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias", False),
        attention_scale=read.positive("attention_multiplier", 1.0),
        embedding_multiplier=read.positive("embedding_multiplier", 1.0),
        residual_multiplier=read.positive("residual_multiplier", 1.0),
        logit_multiplier=read.positive("logits_scaling", 1.0) ** -1.0,
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "attention_multiplier": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": inverse(config.logit_multiplier, -1.0),
    }


GRANITE = Family(
    name="granite",
    model_types=("granite",),
    architecture="GraniteForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)
