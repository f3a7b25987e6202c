"""Gemma 1 to 3, text (Gemma Team 2024, 2024, 2025): norms of 1 + weight, embeddings times sqrt(width), windows, soft-caps."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import (
    FULL,
    SLIDING,
    Family,
    Reader,
    activation_to_hf,
    inverse,
    layer_types,
    one_window,
    rope_to_hf,
)
from llmctl.core.families.llama import LLAMA_RULES, SANDWICH_RULES, read_common, write_common


def _facts(read: Reader, common: dict[str, Any]) -> dict[str, Any]:
    """What all three have in common beyond Llama's."""
    read.refuse("use_bidirectional_attention")
    bias = read.flag("attention_bias", False)
    return {
        **common,
        "norm_plus_one": True,
        "embedding_multiplier": common["hidden_size"] ** 0.5,
        "qkv_bias": bias,
        "attention_out_bias": bias,
    }


def _newer_facts(read: Reader, common: dict[str, Any], *, softcaps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What the second and third have beyond the first; `softcaps` are the defaults for attention and logits."""
    return {
        **_facts(read, common),
        "post_norms": True,
        "attention_scale": read.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_softcap": read.optional_number("attn_logit_softcapping", softcaps[0]),
        "logit_softcap": read.optional_number("final_logit_softcapping", softcaps[1]),
    }


def _write_newer(config: ModelConfig) -> dict[str, Any]:
    written = write_common(config)
    del written["hidden_act"]
    scalar = inverse(config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5, -0.5)
    return {
        **written,
        "hidden_activation": activation_to_hf(config.activation),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": one_window(config) or 4096,
        "layer_types": layer_types(config),
    }


def _gemma_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    common = read_common(hf, head_dim=256, kv_heads=16, activation=("hidden_act", "gelu_pytorch_tanh"), tied=True, max_positions=8192)
    if common["activation"] == "gelu":  # the first configs say gelu and mean its approximation, as transformers knows too
        common["activation"] = "gelu_tanh"
    return ModelConfig(**_facts(Reader(hf), common))


def _gemma_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), "attention_bias": config.qkv_bias}


_ACTIVATION = ("hidden_activation", "gelu_pytorch_tanh")


def _gemma2_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    common = read_common(hf, head_dim=256, kv_heads=4, activation=_ACTIVATION, tied=True, max_positions=8192)
    kinds = [SLIDING if i % 2 == 0 else FULL for i in range(_bounded(common["num_layers"]))]
    windows = read.windows(common["num_layers"], window=read.optional_integer("sliding_window", 4096), kinds=kinds)
    return ModelConfig(**_newer_facts(read, common, softcaps=(50.0, 30.0)), windows=windows)


def _gemma3_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    read.refuse("attn_logit_softcapping", unless=None)  # Gemma 3's code reads this key and never applies it
    usual, local_theta = _gemma3_ropes(hf)
    common = read_common(hf, head_dim=256, kv_heads=4, activation=_ACTIVATION, tied=True, max_positions=131_072, rope=usual)
    pattern = read.integer("sliding_window_pattern", 6)
    if pattern < 1:
        raise InputError(f"config.json: sliding_window_pattern is {pattern}; 1 or more is wanted")
    kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(_bounded(common["num_layers"]))]
    windows = read.windows(common["num_layers"], window=read.optional_integer("sliding_window", 4096), kinds=kinds)
    return ModelConfig(**_newer_facts(read, common, softcaps=(None, None)), windows=windows, qk_norm=True, local_rope_theta=local_theta)


def _gemma3_ropes(hf: Mapping[str, Any]) -> tuple[tuple[float, Any, float], float]:
    """The rope of layers that see all, and the theta of those with a window: tables by kind of layer, or version 4's keys."""
    read = Reader(hf)
    theta, local = read.number("rope_theta", 1e6), read.number("rope_local_base_freq", 1e4)
    tables = hf.get("rope_parameters")
    if tables is None:
        scaling = hf.get("rope_scaling")
        tables = {FULL: {} if scaling is None else scaling}
    if not isinstance(tables, Mapping) or not all(table is None or isinstance(table, Mapping) for table in tables.values()):
        raise InputError(f"config.json: rope_parameters are {str(tables)[:80]}; an object for each kind of layer is wanted")
    usual = read.rope_table(tables.get(FULL) or {}, theta=theta, share=1.0)
    local, scaling, share = read.rope_table(tables.get(SLIDING) or {}, theta=local, share=1.0)
    if scaling is not None or share != 1.0:
        raise InputError("config.json: scaled or partial rotary positions in layers with a window are not supported")
    return usual, local


def _gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta}
    return {**_write_newer(config), "rope_parameters": {FULL: rope_to_hf(config), SLIDING: local}}


def _bounded(num_layers: int) -> int:
    """Layers to list before ModelConfig has refused a number beyond all reason."""
    return min(num_layers, 1 << 16)


GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    config_from_hf=_gemma_from_hf,
    config_to_hf=_gemma_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    config_from_hf=_gemma2_from_hf,
    config_to_hf=_write_newer,
    rules=SANDWICH_RULES,
    trunk_prefix="model.",
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    config_from_hf=_gemma3_from_hf,
    config_to_hf=_gemma3_to_hf,
    rules=SANDWICH_RULES,
    trunk_prefix="model.",
)
