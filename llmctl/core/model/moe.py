"""A feed-forward of many experts, of which each token passes through a few. Knows hidden states; knows no attention.

Each expert works once a call, on the tokens that chose it and no others, and one that nobody chose does not work at all.
Experts are mlps with matrices of their own rather than one stacked tensor: that is how Hugging Face stores them, so that
they are mapped from the file as they lie, and how optimizers, adapters and quantisers name matrices.

Legend: N tokens, C hidden size, E experts, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.core.config.model import ModelConfig
from llmctl.core.model.mlp import Mlp


class RoutedMlp(nn.Module):
    """Softmax over all experts, the best k, their weighted sum (Mixtral, Jiang et al. 2024)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.experts
        assert experts is not None
        self._num_active, self._normalised = experts.num_active, experts.normalised
        self.router = nn.Linear(config.hidden_size, experts.num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(config, size=experts.mlp_size) for _ in range(experts.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        weights, chosen = self.route(flat)  # (N, k) each
        order = chosen.flatten().argsort(stable=True)  # the N * k pairs of token and expert, expert by expert
        tokens = order // self._num_active
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        groups = torch.split(flat[tokens], counts)
        outputs = [expert(group) for expert, group in zip(self.experts, groups, strict=True) if len(group)]
        if not outputs:
            return x.clone()  # no token, no expert
        weighted = torch.cat(outputs) * weights.flatten()[order, None]  # (N * k, C)
        return torch.zeros_like(flat).index_add(0, tokens, weighted).view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, in x's dtype, and numbers of the experts of each token, (N, k) each, of x (N, C)."""
        probabilities = F.softmax(self.router(x), dim=-1, dtype=torch.float32)  # (N, E)
        weights, chosen = probabilities.topk(self._num_active, dim=-1)
        if self._normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen
