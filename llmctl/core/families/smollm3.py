"""SmolLM3 (Hugging Face 2025): Llama with every fourth layer without rotary positions (Yang et al. 2025, RNoPE)."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.families.base import FULL, SLIDING, Family, Reader, layer_types, one_window
from llmctl.core.families.llama import LLAMA_RULES, read_common, write_common


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    common = read_common(hf, head_dim=None, kv_heads=4, theta=2e6, tied=True, max_positions=32_768)
    num_layers = common["num_layers"]
    rotates = hf.get("no_rope_layers")  # 1 where there are rotary positions, for all its name
    if rotates is None:
        interval = read.integer("no_rope_layer_interval", 4)
        if interval < 1:
            raise InputError(f"config.json: no_rope_layer_interval is {interval}; 1 or more is wanted")
        rotates = [int((i + 1) % interval != 0) for i in range(min(num_layers, 1 << 16))]
    if not isinstance(rotates, list) or not all(isinstance(flag, int) and flag in (0, 1) for flag in rotates):
        raise InputError(f"config.json: no_rope_layers is {str(rotates)[:80]}; a list of 0 and 1 is wanted")
    window = read.optional_integer("sliding_window", None) if read.flag("use_sliding_window", False) else None
    kinds = [FULL if flag or window is None else SLIDING for flag in rotates]
    bias = read.flag("attention_bias", False)
    return ModelConfig(
        **common,
        rope_layers=tuple(bool(flag) for flag in rotates),
        windows=read.windows(num_layers, window=window, kinds=kinds),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias", False),
    )


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    rotates = config.rope_layers or (True,) * config.num_layers
    return {
        **write_common(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(flag) for flag in rotates],
        "use_sliding_window": config.windows is not None,
        "sliding_window": one_window(config),
        "layer_types": layer_types(config),
    }


SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)
