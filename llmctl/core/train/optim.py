"""The optimizer over float32 masters: Muon for hidden matrices, AdamW for the rest. Knows named parameters; knows no data.

A model that computes in bf16 gets its weights from float32 masters after each step, and its gradients are added up in
float32; a model that computes in the masters' own dtype shares their memory. Parameters of one shape that Muon treats lie
in one stack, so that a step is a few batched operations.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmctl.core.errors import InputError
from llmctl.core.train.muon import muon_step

AVERAGE = ".ema"
"""After a parameter's name: its moving average, in the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights follow gradients. Rates are the peaks that a schedule scales."""

    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    clip: float | None = 1.0
    ema: float | None = None
    """Decay of the moving average of the weights; at step n it is at most (1 + n) / (10 + n), so that the start is forgotten."""


@dataclass
class _Stack:
    """Parameters of one shape under Muon, as (N, R, C) tensors."""

    names: list[str]
    weights: Tensor
    gradients: Tensor
    momentum: Tensor


class MasterOptimizer:
    """Masters, gradients and optimizer state of the trainable parameters of `model`.

    `hidden_matrices` names the parameters that Muon treats; an empty one gives AdamW alone. `master_dtype` is float32
    but for tests. After construction the parameters of `model` have `compute_dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        hidden_matrices: Iterable[str],
        compute_dtype: torch.dtype,
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.num_updates = 0
        self._muon_dtype = compute_dtype  # a CPU without bf16 arithmetic emulates it, slower than float32
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shares_memory = compute_dtype == master_dtype
        """Whether the model's parameters and gradients are the masters' own."""
        self.masters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        """What `collect` adds to, by name: the masters' gradients."""
        hidden = set(hidden_matrices) if config.kind == "muon" else set()
        unknown = hidden - set(self._parameters)
        if unknown:
            raise ValueError(f"no trainable parameters named {sorted(unknown)}")
        self._stacks = self._make_stacks([n for n in self._parameters if n in hidden], master_dtype)
        for name, parameter in self._parameters.items():
            if name not in hidden:
                self.masters[name] = parameter.detach().to(master_dtype, copy=True)
                self.gradients[name] = torch.zeros_like(self.masters[name])
        self._adamw_names = [n for n in self._parameters if n not in hidden]
        self._adamw = self._make_adamw()
        self.averages = {name: master.clone() for name, master in self.masters.items()} if config.ema is not None else {}
        """The moving average of each master; empty without `config.ema`."""
        for name, parameter in model.named_parameters():
            if name in self.masters and self.shares_memory:
                parameter.data = self.masters[name]
                parameter.grad = self.gradients[name]
            else:
                # weights may be mapped from a file, which is fine for those that stay as they are
                parameter.data = parameter.data.to(compute_dtype, copy=name in self.masters)
                parameter.grad = None

    def _make_stacks(self, names: list[str], dtype: torch.dtype) -> list[_Stack]:
        by_shape: dict[torch.Size, list[str]] = {}
        for name in names:
            by_shape.setdefault(self._parameters[name].shape, []).append(name)
        stacks = []
        for members in by_shape.values():
            weights = torch.stack([self._parameters[n].detach().to(dtype) for n in members])  # (N, R, C)
            stack = _Stack(members, weights, torch.zeros_like(weights), torch.zeros_like(weights))
            for i, name in enumerate(members):
                self.masters[name] = weights[i]
                self.gradients[name] = stack.gradients[i]
            stacks.append(stack)
        return stacks

    def _make_adamw(self) -> torch.optim.AdamW | None:
        if not self._adamw_names:
            return None
        c = self.config
        matrices = [self.masters[n] for n in self._adamw_names if self.masters[n].ndim >= 2]
        vectors = [self.masters[n] for n in self._adamw_names if self.masters[n].ndim < 2]
        groups = [{"params": params, "weight_decay": decay} for params, decay in ((matrices, c.weight_decay), (vectors, 0.0)) if params]
        fused = self.masters[self._adamw_names[0]].device.type in ("cpu", "cuda", "mps")
        optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=fused)
        for name in self._adamw_names:
            master = self.masters[name]
            master.grad = self.gradients[name]
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        return optimizer

    def zero_gradients(self) -> None:
        """Forget what was collected, before the first micro-batch of a step."""
        for stack in self._stacks:
            stack.gradients.zero_()
        for name in self._adamw_names:
            self.gradients[name].zero_()
        if not self.shares_memory:
            for parameter in self._parameters.values():
                parameter.grad = None

    def collect(self) -> None:
        """Add the gradients of one micro-batch to the masters', in the masters' dtype. Call after each backward."""
        if self.shares_memory:
            return  # autograd added them in place
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.gradients[name].add_(parameter.grad)
                parameter.grad = None

    def clip(self) -> Tensor:
        """Scale the collected gradients to a norm of at most `config.clip`; give the norm before, as a 0-d tensor."""
        parts = [s.gradients for s in self._stacks] + [self.gradients[n] for n in self._adamw_names]
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
        if self.config.clip is not None:
            scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(parts, scale)
        return norm

    def step(self, *, lr_scale: float) -> None:
        """Update masters from the collected gradients, and the model's weights from the masters."""
        c = self.config
        for stack in self._stacks:
            muon_step(
                stack.weights,
                stack.gradients,
                stack.momentum,
                learning_rate=c.muon_learning_rate * lr_scale,
                momentum=c.muon_momentum,
                weight_decay=c.weight_decay,
                dtype=self._muon_dtype,
            )
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = c.learning_rate * lr_scale
            self._adamw.step()
        if c.ema is not None:
            decay = min(c.ema, (1 + self.num_updates) / (10 + self.num_updates))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averages.values()), [self.masters[n] for n in self.averages], 1.0 - decay)
        self.num_updates += 1
        self.write_back()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the averaged weights instead of the trained ones."""
        with torch.no_grad():
            for name, average in self.averages.items():
                if self.shares_memory:
                    self._parameters[name].data = average
                else:
                    self._parameters[name].copy_(average)
        try:
            yield
        finally:
            if self.shares_memory:
                for name in self.averages:
                    self._parameters[name].data = self.masters[name]
            self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the masters' weights, rounded to its dtype."""
        if not self.shares_memory:
            names = list(self._parameters)
            torch._foreach_copy_([self._parameters[n] for n in names], [self.masters[n] for n in names])

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the state before the first step, weights apart; used after steps at rate 0 that only measured time."""
        for name, tensor in self.state_tensors().items():
            if not name.endswith(AVERAGE):
                tensor.zero_()
        for name, average in self.averages.items():
            average.copy_(self.masters[name])
        self._set_num_updates(0)

    def _set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates
        if self._adamw is not None:
            for name in self._adamw_names:
                self._adamw.state[self.masters[name]]["step"].fill_(num_updates)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name: `<parameter>.momentum` or `<parameter>.exp_avg` and `.exp_avg_sq`; and `.ema`."""
        tensors = {f"{name}.momentum": stack.momentum[i] for stack in self._stacks for i, name in enumerate(stack.names)}
        if self._adamw is not None:
            for name in self._adamw_names:
                state = self._adamw.state[self.masters[name]]
                tensors |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors | {f"{name}{AVERAGE}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def load(self, *, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], num_updates: int, where: str) -> None:
        """Restore masters, state and the count of updates. Raises InputError that names `where` and what does not fit."""
        for wanted, found in ((self.masters, weights), (self.state_tensors(), state)):
            for name, tensor in wanted.items():
                if name not in found:
                    raise InputError(f"{where}: the tensor {name} is missing")
                if found[name].shape != tensor.shape:
                    raise InputError(f"{where}: {name} has shape {tuple(found[name].shape)}, {tuple(tensor.shape)} is wanted")
                tensor.copy_(found[name])
            extra = set(found) - set(wanted)
            if extra:
                raise InputError(f"{where}: unknown tensors {', '.join(sorted(extra)[:3])}")
        self._set_num_updates(num_updates)
        self.write_back()
