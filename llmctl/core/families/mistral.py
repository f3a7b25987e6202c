"""Mistral (Jiang et al. 2023: a sliding window in every layer) and Mixtral (Jiang et al. 2024: experts instead of mlps)."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import Experts, ModelConfig
from llmctl.core.families.base import Family, Reader, Rule, one_window
from llmctl.core.families.llama import LLAMA_RULES, read_common, write_common


def windows_everywhere(hf: Mapping[str, Any], num_layers: int, *, default: int | None) -> tuple[int | None, ...] | None:
    """One window for all layers, or none: `sliding_window`, which may be null."""
    window = Reader(hf).optional_integer("sliding_window", default)
    return None if window is None else (window,) * num_layers


def _mistral_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    common = read_common(hf, head_dim=None, kv_heads=8, max_positions=4096 * 32)
    return ModelConfig(**common, windows=windows_everywhere(hf, common["num_layers"], default=4096))


def _mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), "sliding_window": one_window(config)}


def _mixtral_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    read = Reader(hf)
    read.refuse("router_jitter_noise", unless=0.0)
    common = read_common(hf, head_dim=None, kv_heads=8, norm_eps=1e-5, theta=1e6, max_positions=4096 * 32)
    experts = Experts(
        num_experts=read.integer("num_local_experts", 8),
        num_active=read.integer("num_experts_per_tok", 2),
        mlp_size=common["mlp_size"],
        normalised=True,
        layers=(True,) * common["num_layers"],
    )
    return ModelConfig(**common, experts=experts, windows=windows_everywhere(hf, common["num_layers"], default=None))


def _mixtral_to_hf(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    counts = {} if experts is None else {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.num_active}
    return {**write_common(config), **counts, "sliding_window": one_window(config)}


MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    config_from_hf=_mistral_from_hf,
    config_to_hf=_mistral_to_hf,
    rules=LLAMA_RULES,
    trunk_prefix="model.",
)

_BLOCK, _L = "model.layers.{i}.block_sparse_moe", "layers.{i}.mlp"

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    config_from_hf=_mixtral_from_hf,
    config_to_hf=_mixtral_to_hf,
    rules=(
        *LLAMA_RULES,
        Rule(f"{_BLOCK}.gate.weight", (f"{_L}.router.weight",)),
        *(
            Rule(f"{_BLOCK}.experts.{{e}}.{theirs}.weight", (f"{_L}.experts.{{e}}.{ours}.weight",))
            for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
    ),
    trunk_prefix="model.",
)
