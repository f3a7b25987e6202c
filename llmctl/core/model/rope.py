"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its stretched variants.

Knows positions and frequencies; knows no attention. Shapes: B rows, T positions, H heads, D head size, R rotated size.
The halves layout of GPT-NeoX and Hugging Face: dimension i is paired with i + R/2.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError
from llmctl.core.model.kernels import Rotate

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def inverse_frequencies(config: ModelConfig, *, num_positions: int | None = None) -> tuple[Tensor, float]:
    """The angle per position of each of the R/2 pairs, (R/2,) float32, and the factor on cosine and sine.

    The arithmetic is that of transformers' modeling_rope_utils.py, in the same order and precision, since angles of far
    positions show every bit. `num_positions` is the length of the text, which only "dynamic" and "longrope" look at.
    """
    size, theta = config.rotary_size, config.rope_theta
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size
    if config.rope_scaling is None:
        return 1.0 / (theta**exponents), 1.0
    kind, parameters = config.rope_scaling.kind, config.rope_scaling.parameters
    if kind == "linear":
        return 1.0 / (theta**exponents) / parameters["factor"], 1.0
    if kind == "dynamic":
        longest = max(num_positions or 0, config.max_positions)
        stretch = parameters["factor"] * longest / config.max_positions - (parameters["factor"] - 1)
        return 1.0 / ((theta * stretch ** (size / (size - 2))) ** exponents), 1.0
    if kind == "llama3":
        return _llama3(1.0 / (theta**exponents), parameters), 1.0
    if kind == "yarn":
        return _yarn(theta, size, exponents, config, parameters)
    if kind == "longrope":
        return _longrope(theta, exponents, config, parameters, num_positions=num_positions)
    raise InputError(f"rope scaling of kind {kind!r} is not known; the kinds are {', '.join(KINDS)}")


def _llama3(frequencies: Tensor, parameters: dict[str, float]) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between are blended."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return torch.where(between, blended, stretched)


def _yarn(theta: float, size: int, exponents: Tensor, config: ModelConfig, parameters: dict[str, float]) -> tuple[Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolate slow pairs, extrapolate fast ones, scale the attention."""
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
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    powers = theta**exponents
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, float(attention_factor)


def _longrope(
    theta: float, exponents: Tensor, config: ModelConfig, parameters: dict[str, Any], *, num_positions: int | None
) -> tuple[Tensor, float]:
    """LongRoPE (https://arxiv.org/abs/2402.13753): a divisor for each pair, one set for short texts and one for long ones."""
    original = parameters["original_max_position_embeddings"]
    divisors = parameters["long_factor" if num_positions is not None and num_positions > original else "short_factor"]
    factor = parameters.get("attention_factor")
    if factor is None:
        stretch = parameters.get("factor") or config.max_positions / original
        factor = 1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * theta**exponents), float(factor)


def _unstretched(config: ModelConfig) -> int | None:
    """The longest text whose angles are those of the table; None where the length of a text does not count."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("dynamic", "longrope"):
        return None
    return config.max_positions if scaling.kind == "dynamic" else int(scaling.parameters["original_max_position_embeddings"])


class Rope:
    """Cosines and sines for positions, from a table that grows when it must. Holds no parameter and no buffer.

    A text's angles depend on nothing but its own positions: under "dynamic" and "longrope" scaling each row is stretched by
    its own length, where transformers takes the longest of the batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._unstretched = _unstretched(config)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def cos_sin(self, positions: Tensor, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, 1, T, R/2) of `positions` (B, T), which lie on the CPU; negative ones count as 0."""
        positions = positions.clamp(min=0)
        longest = int(positions.max()) + 1
        if self._unstretched is not None and longest > self._unstretched:
            rows = [self._angles(row, int(row.max()) + 1) for row in positions]
            return (
                torch.stack([cos for cos, _ in rows]).unsqueeze(1).to(device, dtype),
                torch.stack([sin for _, sin in rows]).unsqueeze(1).to(device, dtype),
            )
        cos, sin = self._table(longest, dtype=dtype, device=device)
        first, num_positions = int(positions[0, 0]), positions.shape[1]
        if torch.equal(positions, torch.arange(first, first + num_positions).expand_as(positions)):
            return cos[None, None, first : first + num_positions], sin[None, None, first : first + num_positions]
        index = positions.to(device)
        return cos[index].unsqueeze(1), sin[index].unsqueeze(1)

    def _table(self, num_positions: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        table = self._tables.get((device, dtype))
        if table is None or table[0].shape[0] < num_positions:
            rounded = 1 << max(8, (num_positions - 1).bit_length())
            cos, sin = self._angles(torch.arange(rounded), None)
            table = self._tables[device, dtype] = cos.to(device, dtype), sin.to(device, dtype)
        return table

    def _angles(self, positions: Tensor, num_positions: int | None) -> tuple[Tensor, Tensor]:
        frequencies, factor = inverse_frequencies(self._config, num_positions=num_positions)
        angles = positions.float()[:, None] * frequencies  # (T, R/2)
        return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of `x` (B, H, T, D) by the angles of `cos`, `sin` (B or 1, 1, T, R/2)."""
    if x.device.type == "cpu" and torch.is_grad_enabled():
        rotated: Tensor = Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
