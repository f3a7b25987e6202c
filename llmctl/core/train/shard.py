"""Spreading a decoder over processes: FSDP2 over layers, tensor parallelism within them. Knows a decoder and a mesh; no loop.

The model comes in on the meta device and gets its weights a tensor at a time, so that no process ever holds the whole.
Parameters become float32 DTensors, the masters; layers are gathered in the compute dtype when they are used.

Over `tp`, the matrices of attention and of the feed-forward are split by heads and by inner numbers; embeddings, head and
norms are whole on each. The norms within heads see only their process's heads, so their gradients are parts of a sum.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llmctl.core.config.mesh import Mesh
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import UsageError
from llmctl.core.model import Decoder
from llmctl.core.model.lora import A_NAME, B_NAME, LoraLinear

_COLUMNS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
_ROWS = ("attn.o", "mlp.down")


def check_splits(config: ModelConfig, mesh: Mesh) -> None:
    """Raise UsageError when the layers of such a model cannot be split as `mesh` wants."""
    if mesh.tp == 1:
        return
    for what, number in (("attention heads", config.num_heads), ("key-value heads", config.num_kv_heads), ("mlp size", config.mlp_size)):
        if number % mesh.tp:
            raise UsageError(f"--mesh tp={mesh.tp}: does not divide the model's {what}, {number}")
    if config.experts is not None:
        raise UsageError(f"--mesh tp={mesh.tp}: a mixture of experts is not split within layers; use fsdp")
    if config.qk_norm_whole:
        raise UsageError(f"--mesh tp={mesh.tp}: this model norms queries over all heads together, so they cannot be split; use fsdp")
    if config.attention_out_bias or config.mlp_bias or config.qkv_bias:
        raise UsageError(f"--mesh tp={mesh.tp}: a model with biases is not split within layers; use fsdp")


def partial_over_tp(name: str, mesh: Mesh) -> bool:
    """Whether a process's gradient of the parameter is only its heads' part."""
    return mesh.tp > 1 and name.endswith(("attn.q_norm.weight", "attn.k_norm.weight"))


def make_device_mesh(mesh: Mesh, device: torch.device, timeout: timedelta) -> DeviceMesh:
    """The mesh of the processes that there are, with the dimensions dp, fsdp and tp, tp varying fastest.

    `timeout` is how long one of its collectives waits; groups that a mesh makes have half an hour by themselves.
    """
    devices = init_device_mesh(device.type, (mesh.dp, mesh.fsdp, mesh.tp), mesh_dim_names=("dp", "fsdp", "tp"))
    for group in devices.get_all_groups():
        _set_pg_timeout(timeout, group)
    return devices


def shard(
    model: Decoder,
    mesh: Mesh,
    devices: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    master_dtype: torch.dtype,
    offload: bool,
) -> dict[str, DTensor]:
    """Spread `model`, which lies on the meta device; give its parameters, on `device` and not filled yet.

    What is trained is held in `master_dtype`, what is frozen beside adapters in `compute_dtype`.
    `offload` keeps masters and optimizer in the CPU's memory.
    """
    _set_dtypes(model, trained=master_dtype, frozen=compute_dtype)
    if mesh.tp > 1:
        # it warns that a matrix split by both fsdp and tp is gathered in two steps, which saving and reading back do
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        for layer in model.layers:
            parallelize_module(layer, devices["tp"], _plan_of(layer))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype)
    over = devices["fsdp"] if mesh.dp == 1 else devices["dp", "fsdp"]
    elsewhere = CPUOffloadPolicy() if offload else OffloadPolicy()
    wrapped = [
        fully_shard(layer, mesh=over, mp_policy=policy, offload_policy=elsewhere, reshard_after_forward=True) for layer in model.layers
    ]
    # the head is used after `hidden`, whose weights are therefore kept until the backward pass
    fully_shard(model, mesh=over, mp_policy=policy, offload_policy=elsewhere, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for one, following in itertools.pairwise(wrapped):
        one.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([one])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the whole batch's tokens already
            module.set_force_sum_reduction_for_comms(True)  # gloo has nothing but sums
    model.to_empty(device="cpu" if offload else device)
    if model.positions is not None and model.config.positions == "sinusoidal":
        model.positions.init_weights(model.config, None)  # a buffer, which nobody fills
    return {name: cast(DTensor, parameter) for name, parameter in model.named_parameters()}


def _set_dtypes(model: Decoder, *, trained: torch.dtype, frozen: torch.dtype) -> None:
    model.to(trained)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)


def _plan_of(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How each matrix of a layer is split over `tp`."""
    plan: dict[str, ParallelStyle] = {}
    for name in (*_COLUMNS, *_ROWS):
        module = _module_of(layer, name)
        if isinstance(module, LoraLinear):
            plan[name] = _AdaptedParallel(by_columns=name in _COLUMNS)
        elif module is not None:
            plan[name] = ColwiseParallel() if name in _COLUMNS else RowwiseParallel()
    return plan


def _module_of(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


class _AdaptedParallel(ParallelStyle):
    """A matrix with an adapter beside it, split as ColwiseParallel or RowwiseParallel split one without.

    By columns each process has its outputs' rows of W and B and all of A; by rows its inputs' columns of W and A, and all of B.
    """

    def __init__(self, *, by_columns: bool) -> None:
        super().__init__()
        self._by_columns = by_columns

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split, whole = Shard(0 if self._by_columns else 1), Replicate()
        places: dict[str, Placement] = {"weight": split}
        places |= {A_NAME: whole, B_NAME: split} if self._by_columns else {A_NAME: split, B_NAME: whole}
        outside, inside = (whole, Shard(-1)) if self._by_columns else (Shard(-1), whole)

        def partition(_name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                spread = distribute_tensor(parameter.detach(), mesh, [places[name]])
                part.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))

        def take_in(_module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [outside], run_check=False)

        def give_out(_module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[inside]).to_local()

        return distribute_module(module, device_mesh, partition, take_in, give_out)  # type: ignore[arg-type]


@torch.no_grad()
def fill(parameters: Mapping[str, DTensor], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy each process's part of `weights`, named whole tensors, into the parameters."""
    for name, whole in weights:
        local_of(parameters[name]).copy_(part_of(whole, parameters[name]))


def local_of(tensor: DTensor) -> Tensor:
    """This process's part of `tensor`, sharing its memory."""
    local: Tensor = tensor.to_local()
    return local.detach()


def part_of(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of `whole`, which every process has, cut as `like` is; no communication."""
    replicas = [Replicate()] * like.device_mesh.ndim
    whole = whole.to(local_of(like).device)
    spread = DTensor.from_local(whole, like.device_mesh, replicas, run_check=False).redistribute(placements=like.placements)
    return spread.to_local()


def spread_like(local: Tensor, like: DTensor) -> DTensor:
    """`local`, this process's part of a tensor that is cut as `like` is, as a DTensor that shares its memory."""
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
