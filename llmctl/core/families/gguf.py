"""Families in GGUF's terms: metadata to facts, tensor names to ours. No torch, no file.

The names are those of llama.cpp's gguf-py/gguf/constants.py, the conversions those of its convert_hf_to_gguf.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl.core.config.model import Experts, ModelConfig, RopeScaling
from llmctl.core.errors import InputError
from llmctl.core.families.base import Rule, Shape

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which stand for Llama 3's scaling."""


class Metadata:
    """Typed reading of GGUF metadata. Every error is an InputError that names the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.architecture = self.text("general.architecture")

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise InputError(f"GGUF metadata: {key} is {'missing' if value is None else repr(value)[:80]}; a string is wanted")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number below `<architecture>.`; a list of equal ones (a value per layer) counts as one."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            what = "missing" if value is None else repr(value)[:80]
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {what}; a whole number is wanted")
        return value

    def number(self, key: str, default: float) -> float:
        """A number below `<architecture>.`: the shortest decimal that gives its float32, so that 1e-05 is 1e-05."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise InputError(f"GGUF metadata: {self.architecture}.{key} is {value!r}; a number is wanted")
        return float(str(np.float32(value)))


@dataclass(frozen=True)
class GgufFamily:
    """How an architecture of GGUF maps to a family of ours.

    `interleaved` says that rows of q and k were reordered so that the two dimensions of a rotary pair lie side by side,
    `norms_hold_one` that the weights of norms have the one added that `ModelConfig.norm_plus_one` leaves to the decoder.
    """

    architecture: str
    family: str
    config: Callable[[Metadata, Mapping[str, Shape], int], ModelConfig]
    rules: tuple[Rule, ...]
    interleaved: bool = False
    norms_hold_one: bool = False

    def norm_shift(self, name: str) -> float:
        """What to take off the decoder's tensor `name`, as the file has it."""
        return 1.0 if self.norms_hold_one and name.endswith("norm.weight") else 0.0


def _rotary_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> dict[str, Any]:
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", hidden // max(heads, 1))
    if meta.integer("attention.value_length", head_dim) != head_dim or meta.integer("rope.dimension_count", head_dim) != head_dim:
        raise InputError("GGUF metadata: heads whose keys, values and rotated part differ in size are not supported")
    theta = meta.number("rope.freq_base", 10_000.0)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_layers": meta.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_size": meta.integer("feed_forward_length"),
        "max_positions": meta.integer("context_length"),
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta),
        "tie_embeddings": "output.weight" not in shapes,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "attention_out_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


def _rope_scaling(meta: Metadata) -> RopeScaling | None:
    kind = meta.values.get(f"{meta.architecture}.rope.scaling.type", "none")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("none", "linear"):
        return RopeScaling(kind="linear", parameters={"factor": factor})
    if kind == "yarn":
        original = meta.integer("rope.scaling.original_context_length", meta.integer("context_length"))
        return RopeScaling(kind="yarn", parameters={"factor": factor, "original_max_position_embeddings": original})
    raise InputError(f"GGUF metadata: {meta.architecture}.rope.scaling.type {kind!r} is not supported")


def _llama_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    return ModelConfig(**_rotary_config(meta, shapes, vocab_size))


def _mixtral_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    common = _rotary_config(meta, shapes, vocab_size)
    return ModelConfig(**common, experts=_experts(meta, common["num_layers"], mlp_size=common["mlp_size"]))


def _qwen3_moe_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    common = _rotary_config(meta, shapes, vocab_size)
    experts = _experts(meta, common["num_layers"], mlp_size=meta.integer("expert_feed_forward_length"))
    return ModelConfig(**common, qk_norm=True, experts=experts)


def _experts(meta: Metadata, num_layers: int, *, mlp_size: int) -> Experts:
    """Routed in every layer, weights divided by their sum, as llama.cpp computes both architectures."""
    return Experts(
        num_experts=meta.integer("expert_count"),
        num_active=meta.integer("expert_used_count"),
        mlp_size=mlp_size,
        normalised=True,
        layers=(True,) * min(num_layers, 1 << 16),
    )


def _qwen_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    return ModelConfig(**_rotary_config(meta, shapes, vocab_size), qk_norm="blk.0.attn_q_norm.weight" in shapes)


def _gemma_common(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> dict[str, Any]:
    common = _rotary_config(meta, shapes, vocab_size)
    multiplier = common["hidden_size"] ** 0.5
    return {**common, "activation": "gelu_tanh", "norm_plus_one": True, "embedding_multiplier": multiplier}


def _gemma_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    return ModelConfig(**_gemma_common(meta, shapes, vocab_size))


def _gemma2_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    common = _gemma_common(meta, shapes, vocab_size)
    window, num_layers = meta.integer("attention.sliding_window", 4096), common["num_layers"]
    return ModelConfig(
        **common,
        post_norms=True,
        windows=tuple(window if i % 2 == 0 else None for i in range(min(num_layers, 1 << 16))),
        attention_scale=_gemma_scale(common, layers_of_27b=46),
        attention_softcap=meta.number("attn_logit_softcapping", 50.0),
        logit_softcap=meta.number("final_logit_softcapping", 30.0),
    )


def _gemma3_config(meta: Metadata, shapes: Mapping[str, Shape], vocab_size: int) -> ModelConfig:
    common = _gemma_common(meta, shapes, vocab_size)
    window, num_layers = meta.integer("attention.sliding_window", 1024), common["num_layers"]
    return ModelConfig(
        **{**common, "rope_theta": meta.number("rope.freq_base", 1e6)},
        post_norms=True,
        qk_norm=True,
        windows=tuple(window if (i + 1) % 6 else None for i in range(min(num_layers, 1 << 16))),
        local_rope_theta=meta.number("rope.freq_base_swa", 10_000.0),
        attention_scale=_gemma_scale(common, layers_of_27b=62),
    )


def _gemma_scale(common: Mapping[str, Any], *, layers_of_27b: int) -> float:
    """The file does not hold query_pre_attn_scalar: llama.cpp tells the 27B models, which have one of their own, by their depth."""
    own = common["num_layers"] == layers_of_27b and common["num_heads"] > 0
    scalar = common["hidden_size"] / common["num_heads"] if own else common["head_dim"]
    return float(scalar**-0.5) if scalar > 0 else 1.0


_B, _L = "blk.{i}", "layers.{i}"


def _pair(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (f"{ours}.weight",)), Rule(f"{theirs}.bias", (f"{ours}.bias",))


_RULES = (
    Rule("token_embd.weight", ("embed.weight",)),
    *_pair(f"{_B}.attn_norm", f"{_L}.attn_norm"),
    *_pair(f"{_B}.attn_q", f"{_L}.attn.q"),
    *_pair(f"{_B}.attn_k", f"{_L}.attn.k"),
    *_pair(f"{_B}.attn_v", f"{_L}.attn.v"),
    *_pair(f"{_B}.attn_output", f"{_L}.attn.o"),
    Rule(f"{_B}.attn_q_norm.weight", (f"{_L}.attn.q_norm.weight",)),
    Rule(f"{_B}.attn_k_norm.weight", (f"{_L}.attn.k_norm.weight",)),
    *_pair(f"{_B}.ffn_norm", f"{_L}.mlp_norm"),
    *_pair(f"{_B}.ffn_gate", f"{_L}.mlp.gate"),
    *_pair(f"{_B}.ffn_up", f"{_L}.mlp.up"),
    *_pair(f"{_B}.ffn_down", f"{_L}.mlp.down"),
    *_pair("output_norm", "final_norm"),
    Rule("output.weight", ("head.weight",)),
)

_SANDWICH = (
    *_RULES,
    Rule(f"{_B}.post_attention_norm.weight", (f"{_L}.attn_post_norm.weight",)),
    Rule(f"{_B}.post_ffw_norm.weight", (f"{_L}.mlp_post_norm.weight",)),
)

_EXPERTS = (
    *_RULES,
    Rule(f"{_B}.ffn_gate_inp.weight", (f"{_L}.mlp.router.weight",)),
    *(Rule(f"{_B}.ffn_{ours}_exps.weight", (f"{_L}.mlp.experts.{{e}}.{ours}.weight",)) for ours in ("gate", "up", "down")),
)
_MIXTRAL = "llama with experts"
"""Our key for what llama.cpp calls llama too, and tells by its experts."""

GGUF_FAMILIES = {
    (_MIXTRAL if family.family == "mixtral" else family.architecture): family
    for family in (
        GgufFamily("llama", "llama", _llama_config, _RULES, interleaved=True),
        GgufFamily("llama", "mixtral", _mixtral_config, _EXPERTS, interleaved=True),
        GgufFamily("qwen2", "qwen2", _qwen_config, _RULES),
        GgufFamily("qwen3", "qwen3", _qwen_config, _RULES),
        GgufFamily("qwen3moe", "qwen3_moe", _qwen3_moe_config, _EXPERTS),
        GgufFamily("gemma", "gemma", _gemma_config, _RULES, norms_hold_one=True),
        GgufFamily("gemma2", "gemma2", _gemma2_config, _SANDWICH, norms_hold_one=True),
        GgufFamily("gemma3", "gemma3", _gemma3_config, _SANDWICH, norms_hold_one=True),
    )
}


def gguf_family(meta: Metadata) -> GgufFamily:
    """The record of an architecture. Raises InputError that lists those that there are."""
    if meta.architecture not in GGUF_FAMILIES:
        raise InputError(f"GGUF architecture {meta.architecture!r} is not supported; the supported ones are {', '.join(GGUF_FAMILIES)}")
    has_experts = meta.architecture == "llama" and meta.integer("expert_count", 0) > 0
    return GGUF_FAMILIES[_MIXTRAL if has_experts else meta.architecture]


def halves_from_pairs(array: Any, head_dim: int) -> Any:
    """Undo llama.cpp's reordering of the rows of q or k: pairs side by side become two halves. Works on any array type."""
    rest = array.shape[1:]
    return array.reshape(-1, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def pairs_from_halves(array: Any, head_dim: int) -> Any:
    """llama.cpp's reordering of the rows of q or k, the inverse of `halves_from_pairs`."""
    rest = array.shape[1:]
    return array.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def llama3_scaling(factors: Any, config: ModelConfig) -> RopeScaling:
    """Llama 3's scaling whose divisors of the frequencies are `factors` (R/2,): GGUF keeps only their result.

    Raises InputError when no published parameters give them.
    """
    size = config.rotary_size
    frequencies = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    wavelengths = 2 * np.pi / frequencies
    factor = float(np.max(factors))
    for original in (8192, 4096, 16384, 32768):
        blend = np.clip((original / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        if np.allclose(1 / ((1 - blend) / factor + blend), factors, rtol=1e-3):
            parameters = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
            return RopeScaling(kind="llama3", parameters=parameters)
    raise InputError(f"GGUF tensor {ROPE_FACTORS!r}: these frequency factors are not those of Llama 3's scaling; not supported")
