"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with fused matrices, and two sets of rotary frequencies by the text's length."""

from collections.abc import Mapping
from typing import Any

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.families.base import Family, Reader, Rule, one_window
from llmctl.core.families.llama import LLAMA_RULES, read_common, write_common
from llmctl.core.families.mistral import windows_everywhere


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    common = read_common(hf, head_dim=None, kv_heads=None, norm_eps=1e-5, max_positions=4096, partial_rotary=True, rope=_rope(hf))
    return ModelConfig(**common, windows=windows_everywhere(hf, common["num_layers"], default=None))


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """As other families write it, but for the type: older configs call longrope "su" or "yarn"."""
    for key in ("rope_parameters", "rope_scaling"):
        table = hf.get(key)
        if isinstance(table, Mapping) and table.get("rope_type", table.get("type")) in ("su", "yarn"):
            hf = {**hf, key: {**table, "rope_type": "longrope"}}
    theta, scaling, share = Reader(hf).rope()
    if scaling is not None and "original_max_position_embeddings" in hf:  # this one wins over the table's, as in transformers
        original = Reader(hf).integer("original_max_position_embeddings")
        scaling = RopeScaling(kind=scaling.kind, parameters={**scaling.parameters, "original_max_position_embeddings": original})
    return theta, scaling, share


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    written = {**write_common(config), "sliding_window": one_window(config), "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if config.rope_scaling is not None:
        written["original_max_position_embeddings"] = config.rope_scaling.parameters["original_max_position_embeddings"]
    written["rope_parameters"] = {"partial_rotary_factor": 1.0, **written["rope_parameters"]}
    return written


_T, _L = "model.layers.{i}", "layers.{i}"

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    config_from_hf=_from_hf,
    config_to_hf=_to_hf,
    rules=(
        *(rule for rule in LLAMA_RULES if not any(part in rule.theirs for part in ("q_", "k_", "v_", "gate_", "up_"))),
        Rule(f"{_T}.self_attn.qkv_proj.weight", (f"{_L}.attn.q.weight", f"{_L}.attn.k.weight", f"{_L}.attn.v.weight")),
        Rule(f"{_T}.mlp.gate_up_proj.weight", (f"{_L}.mlp.gate.weight", f"{_L}.mlp.up.weight")),
    ),
    trunk_prefix="model.",
)
