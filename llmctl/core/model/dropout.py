"""Dropout as a pure function of (seed, sample, place): what falls out does not depend on the batch that a sample is in.

So the result of a step is the same in any micro-batches and on any number of ranks, a resumed run needs no generator's
state, and the backward pass draws the same numbers again instead of keeping them. Knows samples by number; knows no layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEPS = 1 << 16
"""16 random bits decide on a number, so a rate is rounded to a multiple of 1 / 65536."""
_MASK64 = (1 << 64) - 1


class Dropout:
    """Srivastava et al. 2014: sets a part `rate` of the numbers to 0 and scales up the rest.

    Row r of what it is called on belongs to the global sample `samples[r]`. On a CPU the numbers are those of Philox
    (Salmon et al. 2011) everywhere; an accelerator draws its own.
    """

    def __init__(self, rate: float, *, seed: int, samples: Sequence[int]) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate of {rate}")
        self._threshold = min(_STEPS - 1, round(rate * _STEPS))
        self._seed, self._samples = seed, tuple(samples)

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """x (B, ...) with numbers left out; `place` tells the calls of one forward pass apart."""
        if x.size(0) != len(self._samples):
            raise ValueError(f"{x.size(0)} rows, but dropout was made for {len(self._samples)} samples")
        result: Tensor = _Drop.apply(x, self, place)  # type: ignore[no-untyped-call]
        return result

    def apply_to(self, x: Tensor, place: int) -> Tensor:
        """The arithmetic, without gradient: also that of the gradient."""
        fallen = torch.stack([self._fallen(x[0], sample, place) for sample in self._samples])  # (B, ...)
        return x.masked_fill(fallen, 0.0).mul_(_STEPS / (_STEPS - self._threshold))

    def _fallen(self, like: Tensor, sample: int, place: int) -> Tensor:
        if like.device.type == "cpu":
            stream = np.random.Philox(key=self._seed & _MASK64, counter=[0, 0, place, sample & _MASK64])
            bits = stream.random_raw(-(-like.numel() // 4)).view(np.int16)[: like.numel()]
            return (torch.from_numpy(bits) < self._threshold - _STEPS // 2).view(like.shape)
        key = np.random.SeedSequence([self._seed, sample, place]).generate_state(1, np.uint64)
        generator = torch.Generator(like.device).manual_seed(int(key[0]) >> 1)
        return torch.rand(like.shape, generator=generator, device=like.device) < self._threshold / _STEPS


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, place: int) -> Tensor:
        ctx.dropout, ctx.place = dropout, place
        return dropout.apply_to(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dropout.apply_to(grad, ctx.place), None, None
