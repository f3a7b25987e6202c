"""OLMo 2 (OLMo Team 2024): norms after attention and mlp rather than before, queries and keys normed as a whole."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.families.base import Family, Reader
from llmctl.core.families.llama import SANDWICH_RULES, read_common, write_common


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    bias = Reader(hf).flag("attention_bias", False)
    common = read_common(hf, head_dim=None, kv_heads=None, norm_eps=1e-5)
    return ModelConfig(**common, pre_norms=False, post_norms=True, qk_norm_whole=True, qkv_bias=bias, attention_out_bias=bias)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), "attention_bias": config.qkv_bias}


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=SANDWICH_RULES,
    trunk_prefix="model.",
)
