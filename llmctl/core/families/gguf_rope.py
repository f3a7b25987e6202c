"""Rotary scaling in GGUF's terms: keys, and tensors that divide the frequencies. Numpy; knows no file.

Llama 3's scaling and longrope are in a GGUF file as their results, one divisor a pair, and parameters are recovered from them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig, RopeScaling
from llmctl.core.errors import InputError
from llmctl.core.families.gguf_metadata import Metadata, shortest_decimal

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which stand for Llama 3's scaling."""
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Longrope's divisors for texts beyond the original context, and within it."""
ROPE_TENSORS = (ROPE_FACTORS, ROPE_LONG, ROPE_SHORT)

_ORIGINAL, _ATTENTION_FACTOR = "rope.scaling.original_context_length", "rope.scaling.attn_factor"


def scaling_of_keys(meta: Metadata) -> RopeScaling | None:
    """What the keys alone say. Raises InputError for a kind that is not supported."""
    kind = meta.values.get(f"{meta.architecture}.rope.scaling.type", "none")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if (kind in ("none", "linear") and factor == 1.0) or kind == "longrope":  # longrope is told by its tensors
        return None
    if kind in ("none", "linear"):
        return RopeScaling(kind="linear", parameters={"factor": factor})
    if kind == "yarn":
        original = meta.integer(_ORIGINAL, meta.integer("context_length"))
        return RopeScaling(kind="yarn", parameters={"factor": factor, "original_max_position_embeddings": original})
    raise InputError(f"GGUF metadata: {meta.architecture}.rope.scaling.type is {str(kind)[:80]!r}, which is not supported")


def with_rope_tensors(config: ModelConfig, tensors: Mapping[str, NDArray[Any]], meta: Metadata) -> ModelConfig:
    """`config` with the scaling that `tensors`, those of ROPE_TENSORS that the file has, stand for. Raises InputError."""
    if ROPE_FACTORS in tensors:
        return dataclasses.replace(config, rope_scaling=llama3_scaling(tensors[ROPE_FACTORS], config))
    if not tensors:
        return config
    for name in (ROPE_LONG, ROPE_SHORT):
        if name not in tensors:
            raise InputError(f"GGUF tensor {name!r} is missing; longrope has two sets of factors")
    parameters: dict[str, Any] = {
        "short_factor": [shortest_decimal(number) for number in tensors[ROPE_SHORT].ravel().tolist()],
        "long_factor": [shortest_decimal(number) for number in tensors[ROPE_LONG].ravel().tolist()],
        "original_max_position_embeddings": meta.integer(_ORIGINAL, config.max_positions),
    }
    if not all(0 < number < 1e12 for key in ("short_factor", "long_factor") for number in parameters[key]):
        raise InputError(f"GGUF tensors {ROPE_SHORT!r} and {ROPE_LONG!r}: numbers above 0 are wanted")
    if not 1 < parameters["original_max_position_embeddings"] <= 1 << 31:
        raise InputError(f"GGUF metadata: {meta.architecture}.{_ORIGINAL} is out of range")
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(kind="longrope", parameters=parameters))
    factor = meta.number(_ATTENTION_FACTOR, 1.0)
    if not math.isclose(factor, longrope_attention_factor(scaled), rel_tol=1e-6):
        scaled = dataclasses.replace(
            scaled, rope_scaling=RopeScaling(kind="longrope", parameters={**parameters, "attention_factor": factor})
        )
    return scaled


def longrope_attention_factor(config: ModelConfig) -> float:
    """The factor on cosines and sines: the config's own, or the paper's (https://arxiv.org/abs/2402.13753, as transformers has it)."""
    assert config.rope_scaling is not None
    parameters = config.rope_scaling.parameters
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    original = parameters["original_max_position_embeddings"]
    stretch = parameters.get("factor") or config.max_positions / original
    return 1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(original))


def as_gguf_has_it(config: ModelConfig) -> ModelConfig:
    """`config` with longrope's stretch told by its effect alone, as a file tells it; the same model within its context.

    So is one without "dynamic" scaling, which sets in beyond the context.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return dataclasses.replace(config, rope_scaling=None)
    if scaling is None or scaling.kind != "longrope":
        return config
    kept = {key: scaling.parameters[key] for key in ("short_factor", "long_factor", "original_max_position_embeddings")}
    plain = dataclasses.replace(config, rope_scaling=RopeScaling(kind="longrope", parameters=kept))
    factor = longrope_attention_factor(config)
    if math.isclose(factor, longrope_attention_factor(plain), rel_tol=1e-6):
        return plain
    return dataclasses.replace(config, rope_scaling=RopeScaling(kind="longrope", parameters={**kept, "attention_factor": factor}))


def scaling_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of the scaling, below the architecture's name: the inverse of `scaling_of_keys`."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    parameters = scaling.parameters
    if scaling.kind == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        return {"rope.scaling.type": "longrope", _ORIGINAL: original, _ATTENTION_FACTOR: longrope_attention_factor(config)}
    if scaling.kind not in ("linear", "yarn"):
        return {}
    keys = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(parameters["factor"])}
    return keys if scaling.kind == "linear" else {**keys, _ORIGINAL: int(parameters["original_max_position_embeddings"])}


def rope_tensors(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """The tensors that stand for the scaling, (R/2,) each: the inverse of `with_rope_tensors`."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        return {ROPE_FACTORS: _llama3_factors(config, scaling.parameters).astype(np.float32)}
    if scaling is not None and scaling.kind == "longrope":
        named = {ROPE_LONG: scaling.parameters["long_factor"], ROPE_SHORT: scaling.parameters["short_factor"]}
        return {name: np.array(numbers, dtype=np.float32) for name, numbers in named.items()}
    return {}


def llama3_scaling(factors: NDArray[Any], config: ModelConfig) -> RopeScaling:
    """Llama 3's scaling whose divisors of the frequencies are `factors` (R/2,).

    Raises InputError when no published parameters give them.
    """
    largest = float(np.max(factors, initial=1.0))
    for original in (8192, 4096, 16384, 32768) if math.isfinite(largest) else ():
        parameters = {
            "factor": shortest_decimal(largest),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        wanted = _llama3_factors(config, parameters)
        if wanted.shape == factors.shape and np.allclose(wanted, factors, rtol=1e-3):
            return RopeScaling(kind="llama3", parameters=parameters)
    raise InputError(f"GGUF tensor {ROPE_FACTORS!r}: these frequency factors are not those of Llama 3's scaling; not supported")


def _llama3_factors(config: ModelConfig, parameters: Mapping[str, Any]) -> NDArray[np.float64]:
    """(R/2,); the formula is transformers'."""
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    size = config.rotary_size
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    blend = np.clip((parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float64] = 1 / ((1 - blend) / factor + blend)
    return factors
