"""The feed-forward of one layer, or of one expert. Knows hidden states; knows no routing.

Legend: C hidden size.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.core.config.model import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated (Shazeer 2020). `size` defaults to the config's mlp_size."""

    def __init__(self, config: ModelConfig, *, size: int | None = None) -> None:
        super().__init__()
        size = config.mlp_size if size is None else size
        self._activation = _ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.hidden_size, size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        inner = self._activation(self.up(x)) if self.gate is None else self._activation(self.gate(x)) * self.up(x)
        result: Tensor = self.down(inner)
        return result
