"""Rotary frequencies and their stretched variants, for torch and for the native executor. Knows ModelConfig; numpy, no torch.

The arithmetic is that of transformers' modeling_rope_utils.py, in the same order and in float32, since angles of far
positions show every bit. Powers are taken by the caller: torch's float32 powers are the reference's to the last bit.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError

Floats = NDArray[np.float32]

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def rope_base(config: ModelConfig, *, num_positions: int | None = None) -> float:
    """The number whose powers are the wavelengths: theta, which "dynamic" enlarges for a text of `num_positions`."""
    scaling, size = config.rope_scaling, config.rotary_size
    if scaling is None or scaling.kind != "dynamic":
        return config.rope_theta
    longest, factor = max(num_positions or 0, config.max_positions), scaling.parameters["factor"]
    stretch = factor * longest / config.max_positions - (factor - 1)
    return float(config.rope_theta * stretch ** (size / (size - 2)))


def frequencies_from_powers(config: ModelConfig, powers: Floats, *, num_positions: int | None = None) -> tuple[Floats, float]:
    """The angle per position of each of the R/2 pairs, (R/2,), and the factor on cosine and sine.

    `powers` (R/2,) are rope_base ** (0/R, 2/R, 4/R, ...); `num_positions` is the length of the text, which "longrope" looks at.
    """
    inverse = np.float32(1.0) / powers
    if config.rope_scaling is None or config.rope_scaling.kind == "dynamic":
        return inverse, 1.0
    kind, parameters = config.rope_scaling.kind, config.rope_scaling.parameters
    if kind == "linear":
        return inverse / np.float32(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(inverse, parameters), 1.0
    if kind == "yarn":
        return _yarn(config, powers, parameters)
    if kind == "longrope":
        return _longrope(config, powers, parameters, num_positions=num_positions)
    raise InputError(f"rope scaling of kind {kind!r} is not known; the kinds are {', '.join(KINDS)}")


def angles(config: ModelConfig, num_positions: int, *, text_length: int | None = None) -> tuple[Floats, Floats]:
    """Cosines and sines of the positions 0 to num_positions - 1, (num_positions, R/2) each, for texts within the context.

    `text_length` is that of the text, which "longrope" looks at.
    """
    exponents = np.arange(0, config.rotary_size, 2, dtype=np.float32) / np.float32(config.rotary_size)
    powers = (np.float64(rope_base(config)) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies, factor = frequencies_from_powers(config, powers, num_positions=text_length)
    turned = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies
    return np.cos(turned) * np.float32(factor), np.sin(turned) * np.float32(factor)


def angle_tables(config: ModelConfig, num_positions: int) -> dict[str, Floats]:
    """All `angles` of a model: "cosines" and "sines", "local_" ones of the layers with a window where these turn by a base of
    their own, and "long_" ones of texts beyond the short ones."""
    short = config.longest_short_text
    kinds = {"": angles(config, num_positions)}
    if config.local_rope_theta is not None:
        local = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
        kinds["local_"] = angles(local, num_positions)
    if short is not None and num_positions > short:
        kinds["long_"] = angles(config, num_positions, text_length=short + 1)
    return {f"{kind}{name}": table for kind, pair in kinds.items() for name, table in zip(("cosines", "sines"), pair, strict=True)}


def _llama3(frequencies: Floats, parameters: dict[str, Any]) -> Floats:
    """Llama 3.1: long waves are stretched, short ones kept, those between are blended."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    # number / tensor is, in torch, the number times the reciprocal
    wavelengths = (np.float32(1.0) / frequencies) * np.float32(2 * math.pi)
    stretched = np.where(wavelengths > np.float32(original / low), frequencies / np.float32(factor), frequencies)
    blend = ((np.float32(1.0) / wavelengths) * np.float32(original) - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1.0) - blend) * stretched / np.float32(factor) + blend * stretched
    between = ~(wavelengths < np.float32(original / high)) & ~(wavelengths > np.float32(original / low))
    return np.where(between, blended, stretched)


def _yarn(config: ModelConfig, powers: Floats, parameters: dict[str, Any]) -> tuple[Floats, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolate slow pairs, extrapolate fast ones, scale the attention."""
    size, theta = config.rotary_size, config.rope_theta
    original = parameters.get("original_max_position_embeddings") or config.max_positions
    factor = parameters.get("factor") or config.max_positions / original

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = mscale(factor, weights[0]) / mscale(factor, weights[1]) if weights[0] and weights[1] else mscale(factor)

    def pair_turning(num_rotations: float) -> float:
        return (size * math.log(original / (num_rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = pair_turning(parameters.get("beta_fast") or 32), pair_turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = ((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    keep = np.float32(1.0) - ramp
    stretched = np.float32(1.0) / (np.float32(factor) * powers) * (np.float32(1.0) - keep)
    return stretched + np.float32(1.0) / powers * keep, float(attention_factor)


def _longrope(config: ModelConfig, powers: Floats, parameters: dict[str, Any], *, num_positions: int | None) -> tuple[Floats, float]:
    """LongRoPE (https://arxiv.org/abs/2402.13753): a divisor for each pair, one set for short texts and one for long ones."""
    original = parameters["original_max_position_embeddings"]
    divisors = parameters["long_factor" if num_positions is not None and num_positions > original else "short_factor"]
    factor = parameters.get("attention_factor")
    if factor is None:
        stretch = parameters.get("factor") or config.max_positions / original
        factor = 1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return np.float32(1.0) / (np.array(divisors, dtype=np.float32) * powers), float(factor)
