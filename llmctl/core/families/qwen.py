"""Qwen2 (biases on q, k, v) and Qwen3 (norms on queries and keys instead): Llama's names, other facts."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.families.base import Family, Reader
from llmctl.core.families.llama import LLAMA_RULES, read_common, write_common


def _windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...] | None:
    """Window of each layer, as Qwen's configs say it: off unless `use_sliding_window`; then from `max_window_layers` on."""
    read = Reader(hf)
    if not read.flag("use_sliding_window", False) or hf.get("sliding_window", 4096) is None:
        return None
    window, first = read.integer("sliding_window", 4096), read.integer("max_window_layers", 28)
    kinds = hf.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.windows is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": next((window for window in config.windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in config.windows],
    }


def _qwen2_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    common = read_common(hf, head_dim=None, kv_heads=32)
    return ModelConfig(**common, qkv_bias=True, windows=_windows(hf, common["num_layers"]))


def _qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), **_windows_to_hf(config)}


def _qwen3_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    common = read_common(hf, head_dim=128, kv_heads=32)
    bias = Reader(hf).flag("attention_bias", False)
    return ModelConfig(**common, qkv_bias=bias, attention_out_bias=bias, qk_norm=True, windows=_windows(hf, common["num_layers"]))


def _qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), "attention_bias": config.qkv_bias, **_windows_to_hf(config)}


QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    config_from_hf=_qwen2_from_hf,
    config_to_hf=_qwen2_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    config_from_hf=_qwen3_from_hf,
    config_to_hf=_qwen3_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)
