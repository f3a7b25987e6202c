"""The optimizer over masters that are spread over processes. Knows DTensors; knows no data. Its oracle is MasterOptimizer.

AdamW looks at each number alone, so each process updates its own. Muon looks at whole matrices: their updates are gathered,
the processes orthogonalise a part of them each, and hand the results round (N matrices of one shape: N / processes each).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmctl.core.distributed.ranks import Ranks
from llmctl.core.errors import InputError
from llmctl.core.train.muon import orthogonalize
from llmctl.core.train.optim import AVERAGE, OptimConfig
from llmctl.core.train.shard import local_of, part_of, spread_like

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The new name since torch 2.13, which warns of the old one."""


class ShardedOptimizer:
    """AdamW, and Muon for `hidden_matrices`, over `parameters` (float32 DTensors, by name) and their gradients.

    `partial` names parameters whose gradients are still to be summed over `tp`, the processes that split a layer. `reshard`
    makes the model forget weights that it has gathered.
    """

    shares_memory = True

    def __init__(
        self,
        parameters: Mapping[str, DTensor],
        config: OptimConfig,
        *,
        hidden_matrices: Iterable[str],
        compute_dtype: torch.dtype,
        ranks: Ranks,
        partial: Iterable[str] = (),
        tp: "dist.ProcessGroup | None" = None,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.num_updates = 0
        self.parameters = dict(parameters)
        self._ranks, self._tp, self._partial = ranks, tp, tuple(partial)
        self._dtype, self._reshard = compute_dtype, reshard
        self.masters = {name: local_of(parameter) for name, parameter in self.parameters.items()}
        """This process's part of each."""
        hidden = set(hidden_matrices) if config.kind == "muon" else set()
        self._muon_names = [name for name in self.parameters if name in hidden]
        self._adamw_names = [name for name in self.parameters if name not in hidden]
        self._momentum = {name: torch.zeros_like(self.masters[name]) for name in self._muon_names}
        self._adamw = self._make_adamw()
        self.averages = {name: master.clone() for name, master in self.masters.items()} if config.ema is not None else {}
        """This process's part of the moving average of each; empty without `config.ema`."""

    def _make_adamw(self) -> torch.optim.AdamW:
        c = self.config
        matrices = [self.masters[n] for n in self._adamw_names if self.masters[n].ndim >= 2]
        vectors = [self.masters[n] for n in self._adamw_names if self.masters[n].ndim < 2]
        groups = [{"params": params, "weight_decay": decay} for params, decay in ((matrices, c.weight_decay), (vectors, 0.0)) if params]
        optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
        for name in self._adamw_names:
            master = self.masters[name]
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return optimizer

    def zero_gradients(self) -> None:
        """Forget what was collected, before the first micro-batch of a step."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def collect(self) -> None:
        """Nothing: FSDP has added the gradients of the micro-batch to this process's parts."""

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradients to a norm of at most `config.clip` over all processes; give the norm before, as a 0-d tensor."""
        gradients = {name: self._gradient(name) for name in self.parameters}
        self._sum_partial(gradients)
        own = torch.stack([torch.linalg.vector_norm(g) ** 2 / self._copies(name) for name, g in gradients.items()]).sum()
        norm = self._ranks.sum_everywhere(own).sqrt()
        if self.config.clip is not None:
            scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients.values()), scale)
        return norm

    def _gradient(self, name: str) -> Tensor:
        """This process's part of the gradient; one that no micro-batch touched (an expert nobody chose) is zero."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = spread_like(torch.zeros_like(self.masters[name]), parameter)
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        return gradient.to_local()

    def _sum_partial(self, gradients: Mapping[str, Tensor]) -> None:
        if not self._partial:
            return
        parts = [gradients[name] for name in self._partial]
        together = torch.cat([part.flatten() for part in parts])
        with self._ranks.contact():
            dist.all_reduce(together, group=self._tp)
        for part, summed in zip(parts, torch.split(together, [part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def _copies(self, name: str) -> int:
        """How many processes hold the same part."""
        parameter = self.parameters[name]
        mesh = parameter.device_mesh
        parts = math.prod(mesh.size(i) for i, place in enumerate(parameter.placements) if not place.is_replicate())
        return self._ranks.size // parts

    @torch.no_grad()
    def step(self, *, lr_scale: float) -> None:
        """Update the masters from the gradients."""
        c = self.config
        by_shape: dict[torch.Size, list[str]] = {}
        for name in self._muon_names:
            by_shape.setdefault(self.parameters[name].shape, []).append(name)
        for names in by_shape.values():
            self._muon_step(names, learning_rate=c.muon_learning_rate * lr_scale)
        for name in self._adamw_names:
            self.masters[name].grad = self._gradient(name)
        for group in self._adamw.param_groups:
            group["lr"] = c.learning_rate * lr_scale
        self._adamw.step()
        for name in self._adamw_names:
            self.masters[name].grad = None
        if c.ema is not None:
            decay = min(c.ema, (1 + self.num_updates) / (10 + self.num_updates))
            torch._foreach_lerp_(list(self.averages.values()), [self.masters[n] for n in self.averages], 1.0 - decay)
        self.num_updates += 1

    def _muon_step(self, names: list[str], *, learning_rate: float) -> None:
        """See muon.muon_step, whose arithmetic this is, for matrices of one shape (R, C)."""
        c = self.config
        wholes = []
        for name in names:
            gradient, momentum = self._gradient(name), self._momentum[name]
            momentum.lerp_(gradient, 1.0 - c.muon_momentum)
            with self._ranks.contact():
                wholes.append(spread_like(gradient.lerp_(momentum, c.muon_momentum), self.parameters[name]).full_tensor())
        share = math.ceil(len(names) / self._ranks.size)
        first = self._ranks.rank * share
        own = torch.zeros(share, *wholes[0].shape, dtype=self._dtype, device=wholes[0].device)  # (N / processes, R, C)
        mine = wholes[first : first + share]
        if mine:
            own[: len(mine)] = orthogonalize(torch.stack(mine), dtype=self._dtype)
        updates = torch.empty(share * self._ranks.size, *own.shape[1:], dtype=own.dtype, device=own.device)
        with self._ranks.contact():
            _all_gather(updates, own)
        rows, columns = own.shape[-2:]
        for i, name in enumerate(names):
            master = self.masters[name]
            master.mul_(1.0 - learning_rate * c.weight_decay)
            master.add_(part_of(updates[i], self.parameters[name]), alpha=-learning_rate * math.sqrt(max(1.0, rows / columns)))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights instead of the trained ones."""
        trained = {name: master.clone() for name, master in self.masters.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, parts: Mapping[str, Tensor]) -> None:
        self._reshard()
        for name, part in parts.items():
            self.masters[name].copy_(part)

    def whole(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Masters or averages as whole tensors, each gathered from all processes when it is looked up."""
        return _Gathered(self.parameters, parts, self._ranks)

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the state before the first step, weights apart; used after steps at rate 0 that only measured time."""
        for name, tensor in self._local_state().items():
            if not name.endswith(AVERAGE):
                tensor.zero_()
        self._set_num_updates(0)

    def _set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates
        for name in self._adamw_names:
            self._adamw.state[self.masters[name]]["step"].fill_(num_updates)

    def _local_state(self) -> dict[str, Tensor]:
        tensors = {f"{name}.momentum": self._momentum[name] for name in self._muon_names}
        for name in self._adamw_names:
            state = self._adamw.state[self.masters[name]]
            tensors |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors | {f"{name}{AVERAGE}": average for name, average in self.averages.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """The state under the names that MasterOptimizer gives it, as DTensors over this process's parts."""
        return {key: spread_like(tensor, self.parameters[key.rpartition(".")[0]]) for key, tensor in self._local_state().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], *, num_updates: int, where: str) -> None:
        """Take the masters from whole tensors, after the state has been read in place. Raises InputError that names `where`."""
        self._reshard()
        for name, parameter in self.parameters.items():
            if name not in weights:
                raise InputError(f"{where}: the tensor {name} is missing")
            if weights[name].shape != parameter.shape:
                raise InputError(f"{where}: {name} has shape {tuple(weights[name].shape)}, {tuple(parameter.shape)} is wanted")
            self.masters[name].copy_(part_of(weights[name], parameter))
        self._set_num_updates(num_updates)


class _Gathered(Mapping[str, Tensor]):
    """Whole tensors of parts that are spread as the parameters are. All processes look up the same names in the same order."""

    def __init__(self, parameters: Mapping[str, DTensor], parts: Mapping[str, Tensor], ranks: Ranks) -> None:
        self._parameters, self._parts, self._ranks = parameters, parts, ranks

    def __getitem__(self, name: str) -> Tensor:
        with self._ranks.contact():
            return spread_like(self._parts[name], self._parameters[name]).full_tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
