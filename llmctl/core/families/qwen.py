"""Qwen2 (biases on q, k, v), Qwen3 (norms on queries and keys instead) and its mixture of experts: Llama's names, other facts."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import Experts, ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import Family, Reader, Rule, one_window
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


def _moe_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    common = read_common(hf, head_dim=None, kv_heads=4, max_positions=32_768)
    num_layers, bias = common["num_layers"], read.flag("attention_bias", False)
    step, plain = read.integer("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if step < 1 or not isinstance(plain, list):
        raise InputError(f"config.json: decoder_sparse_step {step} or mlp_only_layers {str(plain)[:80]} is out of range")
    window = read.optional_integer("sliding_window", 4096) if read.flag("use_sliding_window", False) else None
    routed = tuple((i + 1) % step == 0 and i not in plain for i in range(min(num_layers, 1 << 16)))
    experts = Experts(
        num_experts=read.integer("num_experts", read.integer("num_local_experts", 128)),
        num_active=read.integer("num_experts_per_tok", 8),
        mlp_size=read.integer("moe_intermediate_size", 768),
        normalised=read.flag("norm_topk_prob", False),
        layers=routed,
    )
    return ModelConfig(
        **common,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        windows=None if window is None else (window,) * num_layers,
        experts=experts,
    )


def _moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    written = {
        **write_common(config),
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.windows is not None,
        "sliding_window": one_window(config),
        "decoder_sparse_step": 1,
    }
    if config.experts is not None:
        written |= {
            "num_experts": config.experts.num_experts,
            "num_experts_per_tok": config.experts.num_active,
            "moe_intermediate_size": config.experts.mlp_size,
            "norm_topk_prob": config.experts.normalised,
            "mlp_only_layers": [i for i in range(config.num_layers) if not config.routes(i)],
        }
    return written


_T, _L = "model.layers.{i}.mlp", "layers.{i}.mlp"

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    config_from_hf=_moe_from_hf,
    config_to_hf=_moe_to_hf,
    rules=(
        *LLAMA_RULES,
        Rule(f"{_T}.gate.weight", (f"{_L}.router.weight",)),
        *(Rule(f"{_T}.experts.{{e}}.{ours}_proj.weight", (f"{_L}.experts.{{e}}.{ours}.weight",)) for ours in ("gate", "up", "down")),
    ),
    trunk_prefix="model.",
)

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
