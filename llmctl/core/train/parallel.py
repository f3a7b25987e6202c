"""How the gradient of a step comes together over ranks. Knows a model, an objective and an optimizer; knows no loop.

Each rank computes its rows of the global batch. Losses are divided by the tokens of the whole batch, so gradients are
summed over ranks, never averaged, and a step is the same for any number of ranks but for the rounding of that sum.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from llmctl.core.data.loader import Batch
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.model import Decoder
from llmctl.core.train.job import TrainJob
from llmctl.core.train.objectives import Objective
from llmctl.core.train.optim import MasterOptimizer
from llmctl.core.train.shard import fill, make_device_mesh, partial_over_tp, shard
from llmctl.core.train.sharded import ShardedOptimizer


class Parallel(Protocol):
    """Takes micro-batches of this rank, and leaves the gradients of all ranks in the optimizer."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """What a micro-batch's loss and its backward pass are within; `last` is that of the step."""
        ...

    def loss(self, part: Batch, *, total_weight: float) -> Tensor:
        """This rank's part of the loss, 0-d, with gradient."""
        ...


class Alone:
    """One process."""

    def __init__(self, model: Decoder, objective: Objective) -> None:
        self._model, self._objective = model, objective

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See Parallel."""
        return contextlib.nullcontext()

    def loss(self, part: Batch, *, total_weight: float) -> Tensor:
        """See Parallel."""
        return self._objective.loss(self._model, part, total_weight=total_weight)


class _LossOf(nn.Module):
    """The loss as a module's forward, which DistributedDataParallel wants: it must see where a step begins."""

    def __init__(self, model: Decoder, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, part: Batch, total_weight: float) -> Tensor:
        return self._objective.loss(self.model, part, total_weight=total_weight)


class Replicated:
    """The whole model on every rank: DistributedDataParallel, whose sums overlap with the backward pass.

    Only the last micro-batch of a step meets the other ranks. What the earlier ones gave is added to it in the masters'
    dtype before the sum, so that bf16 gradients are added up in float32 here as on one rank.
    """

    def __init__(self, model: Decoder, objective: Objective, optimizer: MasterOptimizer, ranks: Ranks) -> None:
        self._ranks, self._optimizer = ranks, optimizer
        with ranks.contact():
            self._module = DistributedDataParallel(
                _LossOf(model, objective),
                find_unused_parameters=model.config.experts is not None,  # an expert that no token chose has no gradient
            )
        self._gradients = {p: optimizer.gradients[n] for n, p in model.named_parameters() if n in optimizer.gradients}
        self._module.register_comm_hook(None, lambda _, bucket: self._sum(bucket))

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See Parallel."""
        with self._ranks.contact(), contextlib.nullcontext() if last else self._module.no_sync():
            yield

    def loss(self, part: Batch, *, total_weight: float) -> Tensor:
        """See Parallel."""
        loss: Tensor = self._module(part, total_weight)
        return loss

    def _sum(self, bucket: Any) -> "torch.futures.Future[Tensor]":
        """Sum a bucket over the ranks. Where gradients are collected apart from the model's, the sum goes there instead."""
        own: Tensor = bucket.buffer()
        if self._optimizer.shares_memory:
            return _all_reduce(own).then(_summed)
        places = [self._gradients[p] for p in bucket.parameters()]
        wide = torch.cat([(g + place).flatten() for g, place in zip(bucket.gradients(), places, strict=True)])

        def put(_done: Any) -> Tensor:
            for place, part in zip(places, torch.split(wide, [p.numel() for p in places]), strict=True):
                place.copy_(part.view_as(place))
            return own.zero_()  # what the model's own gradients are set to, and `collect` adds

        return _all_reduce(wide).then(put)


def _summed(done: "torch.futures.Future[list[Tensor]]") -> Tensor:
    return done.value()[0]


class Spread:
    """A part of the model on each rank: FSDP2, and tensor parallelism where the mesh has it. See shard.py."""

    def __init__(self, model: FSDPModule, objective: Objective, ranks: Ranks) -> None:
        self._model, self._objective, self._ranks = model, objective, ranks

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See Parallel. Each micro-batch's gradients are scattered at once, so that no rank holds them whole; only copies wait."""
        with self._ranks.contact():
            self._model.set_requires_all_reduce(last)
            self._model.set_is_last_backward(last)
            yield

    def loss(self, part: Batch, *, total_weight: float) -> Tensor:
        """See Parallel."""
        return self._objective.loss(cast(Decoder, self._model), part, total_weight=total_weight)


def _all_reduce(tensor: Tensor) -> "torch.futures.Future[list[Tensor]]":
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    return future


def set_up(job: TrainJob) -> tuple[MasterOptimizer | ShardedOptimizer, Parallel]:
    """The optimizer and the way for this job. A model that is to be spread gets its weights here."""
    if job.mesh.shards:
        return _spread(job)
    optimizer = MasterOptimizer(
        job.model,
        job.optim,
        hidden_matrices=job.hidden_matrices,
        compute_dtype=job.compute_dtype,
        master_dtype=job.master_dtype,
    )
    if job.ranks.size == 1:
        return optimizer, Alone(job.model, job.objective)
    return optimizer, Replicated(job.model, job.objective, optimizer, job.ranks)


def _spread(job: TrainJob) -> tuple[ShardedOptimizer, Parallel]:
    assert job.weights is not None
    with job.ranks.contact():
        devices = make_device_mesh(job.mesh, job.device, job.ranks.timeout)
        parameters = shard(
            job.model,
            job.mesh,
            devices,
            device=job.device,
            compute_dtype=job.compute_dtype,
            master_dtype=job.master_dtype,
            offload=job.offload,
        )
        fill(parameters, job.weights())
    model = cast(FSDPModule, job.model)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer = ShardedOptimizer(
        trained,
        job.optim,
        hidden_matrices=job.hidden_matrices,
        compute_dtype=job.compute_dtype,
        ranks=job.ranks,
        partial=[name for name in trained if partial_over_tp(name, job.mesh)],
        tp=devices["tp"].get_group() if job.mesh.tp > 1 else None,
        reshard=model.reshard,
    )
    return optimizer, Spread(model, job.objective, job.ranks)
