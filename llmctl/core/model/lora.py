"""Low-rank adapters on the matrices of a decoder (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685). Knows no file and no family.

A matrix W (outputs, inputs) that is adapted computes x W^T + scale * (dropout(x) A^T) B^T, where A (rank, inputs) and
B (outputs, rank) are trained and W is frozen. Where a checkpoint of the model's family holds several matrices as one (the
queries, keys and values of GPT-2), they share one A, as an adapter on the joined matrix would: so that what is trained can be
said in the names of that checkpoint.

Legend: r rank, I inputs, O outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.core.model.decoder import Decoder
from llmctl.core.model.dropout import Dropout

A_NAME, B_NAME = "lora_a", "lora_b"
"""The parameters' names behind their module's."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How large the adapters are and how much they count: the product of the two matrices is scaled by alpha / rank.

    `dropout` is the rate of what is left out of their inputs in training, for those who draw it; see AdapterDropout.
    """

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank


class AdapterDropout:
    """What is left out of the inputs of all adapters of a model while it trains: set `now` before each micro-batch.

    It counts only where gradients are wanted, so an evaluation between two steps has none.
    """

    def __init__(self) -> None:
        self.now: Dropout | None = None

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """x (B, T, I), with numbers left out."""
        return x if self.now is None or not torch.is_grad_enabled() else self.now(x, place)


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` with an adapter beside it. `weight` and `bias` keep their names; A may be that of `sharing`.

    `place` tells the inputs apart that `dropout` falls on; those who share an A have one.
    """

    def __init__(
        self, frozen: nn.Linear, config: LoraConfig, *, dropout: AdapterDropout, place: int, sharing: "LoraLinear | None" = None
    ) -> None:
        super().__init__()
        self.weight, self.bias = frozen.weight, frozen.bias
        outputs, inputs = frozen.weight.shape
        device = frozen.weight.device
        if sharing is None:
            self.lora_a = nn.Parameter(torch.empty(config.rank, inputs, dtype=torch.float32, device=device))
        # the module and not its parameter, which what spreads a model puts another in place of;
        # in a tuple, so that it is not registered a second time
        self._with_a = (self if sharing is None else sharing,)
        self.lora_b = nn.Parameter(torch.zeros(outputs, config.rank, dtype=torch.float32, device=device))
        self._scale, self._dropout, self._place = config.scale, dropout, place

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        (owner,) = self._with_a
        inner = F.linear(self._dropout(x, self._place), owner.lora_a)  # (..., r)
        return F.linear(x, self.weight, self.bias) + F.linear(inner, self.lora_b) * self._scale


def add_adapters(model: Decoder, groups: Sequence[Sequence[str]], config: LoraConfig, *, seed: int) -> AdapterDropout:
    """Freeze `model` and put an adapter on each matrix named in `groups` (module names); those of one group share their A.

    A is drawn from uniform(-1/sqrt(I), 1/sqrt(I)), as PEFT does it (Kaiming with a = sqrt(5)), on the CPU, so that a seed
    means the same everywhere; B is zero, so the model computes what it did before. Gives the dropout of all of them, which
    is none until it is set.
    """
    model.requires_grad_(False)
    generator, dropout = torch.Generator().manual_seed(seed), AdapterDropout()
    for place, names in enumerate(groups):
        first: LoraLinear | None = None
        for name in names:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            frozen = getattr(owner, child)
            adapted = LoraLinear(frozen, config, dropout=dropout, place=place, sharing=first)
            if first is None:
                first = adapted
                bound = 1 / math.sqrt(frozen.weight.shape[1])
                with torch.no_grad():
                    first.lora_a.copy_(torch.empty(first.lora_a.shape).uniform_(-bound, bound, generator=generator))
            setattr(owner, child, adapted)
    return dropout


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a decoder's tensors by name, those of adapters."""
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in (A_NAME, B_NAME)}


def num_adapter_parameters(groups: Sequence[Sequence[tuple[int, int]]], rank: int) -> int:
    """How many numbers the adapters of `groups` have, of which each matrix is given by its shape (O, I)."""
    return sum(rank * (shapes[0][1] + sum(outputs for outputs, _ in shapes)) for shapes in groups)
