"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its stretched variants.

Knows positions and frequencies; knows no attention. Shapes: B rows, T positions, H heads, D head size, R rotated size.
The halves layout of GPT-NeoX and Hugging Face: dimension i is paired with i + R/2.
"""

import torch
from torch import Tensor

from llmctl.core.config.model import ModelConfig
from llmctl.core.model.frequencies import frequencies_from_powers, rope_base
from llmctl.core.model.kernels import Rotate, run_here


def inverse_frequencies(config: ModelConfig, *, num_positions: int | None = None) -> tuple[Tensor, float]:
    """The angle per position of each of the R/2 pairs, (R/2,) float32, and the factor on cosine and sine.

    `num_positions` is the length of the text, which only "dynamic" and "longrope" scaling look at.
    """
    size = config.rotary_size
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size
    powers = rope_base(config, num_positions=num_positions) ** exponents
    frequencies, factor = frequencies_from_powers(config, powers.numpy(), num_positions=num_positions)
    return torch.from_numpy(frequencies), factor


def _unstretched(config: ModelConfig) -> int | None:
    """The longest text whose angles are those of the table; None where the length of a text does not count."""
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        return config.max_positions
    return config.longest_short_text


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

    @property
    def longest(self) -> int | None:
        """The longest text whose angles do not depend on its length; None where no text's do."""
        return self._unstretched

    def table(self, num_positions: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, R/2) of the positions below N, at least `num_positions`, which `longest` bounds."""
        return self._table(num_positions, dtype=dtype, device=device)

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
    if run_here(x):
        rotated: Tensor = Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
