"""What a run would take on machines one does not have: memory of a process and time of a step, by a stated cost model.

Knows arithmetic, a model's facts and a table of accelerators; knows no torch. docs/scaling.md states the model in words.
Peaks are what makers publish for dense bf16 products; links are bytes a second in one direction, for one accelerator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmctl.core.config.mesh import Mesh
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import UsageError
from llmctl.core.model.facts import flops_per_token, layer_activation_bytes, loss_bytes, muon_scratch_bytes, tensor_shapes
from llmctl.core.train.events import PlannedElsewhere

EFFICIENCY = 0.45
"""Of the published peak, that products of a training step reach on a GPU when nothing is waited for."""
OVERLAP = 0.8
"""Of the time of the backward pass, that gradients and weights may travel in without being waited for."""
RUNTIME_BYTES = 1.5e9
"""What CUDA, NCCL and the libraries take on each GPU."""
SLACK = 1.08
"""For what the allocator cannot use."""
NETWORK_BYTES_PER_S = 50e9
"""Between nodes, for each GPU: 400 Gb/s."""
NODE_SIZE = 8
_LINK_SHARE = 0.8
"""Of a link's rate, that collectives reach."""
_REDUCED_BYTES = 4
"""Gradients travel in float32."""


@dataclass(frozen=True)
class Gpu:
    """Published figures of an accelerator."""

    flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


GPUS: dict[str, Gpu] = {
    "A10G": Gpu(70e12, 24e9, 600e9, 32e9),
    "L4": Gpu(121e12, 24e9, 300e9, 32e9),
    "L40S": Gpu(362e12, 48e9, 864e9, 32e9),
    "RTX4090": Gpu(165e12, 24e9, 1008e9, 32e9),
    "A100-40G": Gpu(312e12, 40e9, 1555e9, 300e9),
    "A100": Gpu(312e12, 80e9, 2039e9, 300e9),
    "H100": Gpu(989e12, 80e9, 3350e9, 450e9),
    "H200": Gpu(989e12, 141e9, 4800e9, 450e9),
    "B200": Gpu(2250e12, 180e9, 8000e9, 900e9),
    "MI300X": Gpu(1307e12, 192e9, 5300e9, 448e9),
}


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` of one kind, `NODE_SIZE` in a node."""

    kind: str
    num_gpus: int

    @property
    def gpu(self) -> Gpu:
        """Its figures."""
        return GPUS[self.kind]


def parse_cluster(text: str) -> Cluster:
    """ "8xH100" as eight of them. Raises UsageError that names the kinds there are."""
    number, _, kind = text.partition("x")
    found = next((name for name in GPUS if name.lower() == kind.strip().lower()), None)
    if not number.strip().isdecimal() or int(number) < 1 or found is None:
        raise UsageError(f"--plan-for {text!r}: write it like 8xH100; kinds are {', '.join(GPUS)}")
    return Cluster(found, int(number))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is, and how the model is trained."""

    seq_len: int
    batch_size: int
    micro_batch_size: int
    muon_share: float
    """Part of the parameters under Muon, which keeps one number each where AdamW keeps two."""
    compute_bytes: int = 2
    recomputes: bool = False


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one process, in bytes; of one step, in seconds. `waiting_s` is communication that nothing hides."""

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    other_bytes: float
    compute_s: float
    optimizer_s: float
    communication_s: float
    waiting_s: float
    tokens: int

    @property
    def memory_bytes(self) -> float:
        """All of it, at the peak."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes + self.other_bytes

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.optimizer_s + self.waiting_s


def estimate(config: ModelConfig, mesh: Mesh, cluster: Cluster, work: Work) -> Estimate:
    """Memory of a process and time of a step of `work` on `cluster`, arranged as `mesh`."""
    sizes = _Sizes.of(config, mesh)
    micro = min(work.micro_batch_size, work.batch_size // mesh.data_size)
    num_micro = math.ceil(work.batch_size / mesh.data_size / micro)
    weights, gradients, optimizer, gathered = _held(sizes, mesh, work)
    activations = _activations(config, mesh, work, micro * work.seq_len)
    if work.muon_share:  # its step comes when the activations are gone; spread matrices are shared out
        activations = max(activations, muon_scratch_bytes(config, compute_bytes=work.compute_bytes) / (mesh.fsdp * mesh.tp))
    computed = _compute_s(config, mesh, cluster, work)
    hidden_by = OVERLAP * computed * 2 / 3
    overlapped, waited = _communication(config, sizes, mesh, cluster, work, num_micro, micro * work.seq_len)
    own = sizes.own * (3 if work.muon_share else 4) * 2 * 4  # masters, gradient and moments, read and written
    return Estimate(
        weight_bytes=weights * SLACK,
        gradient_bytes=gradients * SLACK,
        optimizer_bytes=optimizer * SLACK,
        activation_bytes=activations * SLACK,
        other_bytes=gathered * SLACK + RUNTIME_BYTES,
        compute_s=computed,
        optimizer_s=own / cluster.gpu.memory_bytes_per_s,
        communication_s=overlapped + waited,
        waiting_s=waited + max(0.0, overlapped - hidden_by),
        tokens=work.batch_size * work.seq_len,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of the model as one process has them."""

    total: float
    """After the split by `tp`."""
    own: float
    """After the split by `fsdp` too: the masters."""
    root: float
    """Embeddings, head and the last norm."""
    layer: float
    """The largest layer, after the split by `tp`."""

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh) -> "_Sizes":
        layers = [0.0] * config.num_layers
        root = 0.0
        for name, shape in tensor_shapes(config).items():
            count = float(math.prod(shape))
            if name.startswith("layers."):
                layers[int(name.split(".")[1])] += count / (mesh.tp if len(shape) == 2 else 1)
            else:
                root += count
        total = root + sum(layers)
        return cls(total, total / mesh.fsdp, root, max(layers, default=0.0))


def _held(sizes: _Sizes, mesh: Mesh, work: Work) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients and optimizer, and of what is gathered or on its way."""
    moments = 4 * (2 - work.muon_share)
    c = work.compute_bytes
    if mesh.shards:
        gathered = (sizes.root + 2 * sizes.layer) * c + (sizes.root + sizes.layer) * (c + _REDUCED_BYTES)
        return 4 * sizes.own, 4 * sizes.own, moments * sizes.own, gathered
    copies = c if c < 4 else 0
    buckets = c * sizes.total if mesh.dp > 1 else 0.0
    return (4 + copies) * sizes.total, (4 + copies) * sizes.total, moments * sizes.total, buckets


def _activations(config: ModelConfig, mesh: Mesh, work: Work, tokens: int) -> float:
    """What facts.training_memory counts; with recomputation twice one layer's, and every layer's input."""
    layers = layer_activation_bytes(config, tokens=tokens, compute_bytes=work.compute_bytes)
    loss = loss_bytes(config, tokens=tokens)
    inputs = tokens * config.hidden_size * work.compute_bytes
    if work.recomputes:
        return loss + 2 * layers / config.num_layers + inputs * config.num_layers
    shared = inputs * 5 * config.num_layers  # inputs of norms and residuals, whole on every process of a tp group
    held = min(layers, shared) + max(0.0, layers - shared) / mesh.tp
    return loss + held * (1 + 1 / config.num_layers)


def _compute_s(config: ModelConfig, mesh: Mesh, cluster: Cluster, work: Work) -> float:
    tokens = work.batch_size * work.seq_len
    flops = flops_per_token(config, work.seq_len) * tokens
    head = 6.0 * config.vocab_size * config.hidden_size * tokens
    flops = (flops - head) * (4 / 3 if work.recomputes else 1.0) + head * mesh.tp  # every process of a tp group has the whole head
    return flops / (cluster.num_gpus * cluster.gpu.flops * EFFICIENCY)


def _communication(
    config: ModelConfig, sizes: _Sizes, mesh: Mesh, cluster: Cluster, work: Work, num_micro: int, tokens: int
) -> tuple[float, float]:
    """Seconds of a step's communication that the backward pass may hide, and of the rest. Rings: (n - 1) / n of the bytes."""
    c = work.compute_bytes

    def rate(span: int) -> float:
        link = cluster.gpu.link_bytes_per_s if span <= NODE_SIZE else min(cluster.gpu.link_bytes_per_s, NETWORK_BYTES_PER_S)
        return link * _LINK_SHARE

    def share(n: int) -> float:
        return (n - 1) / n

    gathering = share(mesh.fsdp) * num_micro * (2 * c + _REDUCED_BYTES) * sizes.total / rate(mesh.tp * mesh.fsdp)
    reduced = _REDUCED_BYTES * sizes.own if mesh.shards else max(c, 4) * sizes.total
    copies = 2 * share(mesh.dp) * reduced / rate(mesh.size)
    layers = 4 * config.num_layers * 2 * share(mesh.tp) * num_micro * tokens * config.hidden_size * c / rate(mesh.tp)
    return gathering + copies, layers


def planned_elsewhere(config: ModelConfig, mesh: Mesh, cluster: Cluster, work: Work, num_steps: Callable[[float], int]) -> PlannedElsewhere:
    """The estimate as an event; `num_steps` says how many steps a run takes when one takes so many seconds."""
    guess = estimate(config, mesh, cluster, work)
    steps = num_steps(guess.step_s)
    speed = guess.tokens / guess.step_s
    return PlannedElsewhere(
        gpus=f"{cluster.num_gpus}x{cluster.kind}",
        mesh=str(mesh),
        fits=guess.memory_bytes <= cluster.gpu.memory_bytes,
        gpu_memory_bytes=cluster.gpu.memory_bytes,
        memory_bytes=guess.memory_bytes,
        weight_bytes=guess.weight_bytes,
        gradient_bytes=guess.gradient_bytes,
        optimizer_bytes=guess.optimizer_bytes,
        activation_bytes=guess.activation_bytes,
        other_bytes=guess.other_bytes,
        step_s=guess.step_s,
        compute_s=guess.compute_s,
        communication_s=guess.communication_s,
        waiting_s=guess.waiting_s,
        tokens_per_second=speed,
        peak_share=speed * flops_per_token(config, work.seq_len) / (cluster.num_gpus * cluster.gpu.flops),
        num_steps=steps,
        total_s=steps * guess.step_s,
    )
