"""Arithmetic about a model: names and shapes, parameters, FLOPs, memory. Knows ModelConfig only; no torch."""

import math
from dataclasses import dataclass

from llmctl.core.config.model import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the decoder, in the order of its `state_dict`.

    A tied head is not there a second time. The table of sinusoidal positions is, though nothing trains it.
    """
    hidden, heads = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm == "layer" and config.norm_bias:
            shapes[f"{name}.bias"] = (hidden,)

    def mlp(name: str, size: int) -> None:
        if config.gated_mlp:
            linear(f"{name}.gate", size, hidden, config.mlp_bias)
        linear(f"{name}.up", size, hidden, config.mlp_bias)
        linear(f"{name}.down", hidden, size, config.mlp_bias)

    if config.positions in ("learned", "sinusoidal"):
        shapes["positions.weight"] = (config.max_positions, hidden)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        if config.pre_norms:
            norm(f"{layer}.attn_norm")
        linear(f"{layer}.attn.q", config.query_size, hidden, config.qkv_bias)
        linear(f"{layer}.attn.k", config.kv_size, hidden, config.qkv_bias)
        linear(f"{layer}.attn.v", config.kv_size, hidden, config.qkv_bias)
        linear(f"{layer}.attn.o", hidden, config.query_size, config.attention_out_bias)
        if config.qk_norm or config.qk_norm_whole:
            shapes[f"{layer}.attn.q_norm.weight"] = (config.query_size if config.qk_norm_whole else heads,)
            shapes[f"{layer}.attn.k_norm.weight"] = (config.kv_size if config.qk_norm_whole else heads,)
        if config.post_norms:
            norm(f"{layer}.attn_post_norm")
        if config.pre_norms:
            norm(f"{layer}.mlp_norm")
        if config.experts is not None and config.routes(i):
            linear(f"{layer}.mlp.router", config.experts.num_experts, hidden, False)
            for e in range(config.experts.num_experts):
                mlp(f"{layer}.mlp.experts.{e}", config.experts.mlp_size)
        else:
            mlp(f"{layer}.mlp", config.mlp_size)
        if config.post_norms:
            norm(f"{layer}.mlp_post_norm")
    norm("final_norm")
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, hidden)
    if config.head_bias:
        shapes["head.bias"] = (config.vocab_size,)
    return shapes


@dataclass(frozen=True)
class ParameterCount:
    """Counts of numbers. `embedding` holds token and position tables and an own head; `non_embedding` is the rest."""

    total: int
    embedding: int
    non_embedding: int


def num_parameters(config: ModelConfig) -> ParameterCount:
    """How many numbers the model has, as its checkpoint stores them: a tied head counts once."""
    embedding = total = 0
    for name, shape in tensor_shapes(config).items():
        total += math.prod(shape)
        if name in ("embed.weight", "positions.weight", "head.weight"):
            embedding += math.prod(shape)
    return ParameterCount(total, embedding, total - embedding)


def layer_matmul_parameters(config: ModelConfig) -> tuple[int, int]:
    """Numbers of the layers' matrices that one token is multiplied with: outside of experts, and of the experts in use."""
    count = {True: 0, False: 0}  # in experts, elsewhere
    for name, shape in tensor_shapes(config).items():
        if name.startswith("layers.") and len(shape) == 2:
            count[".experts." in name] += math.prod(shape)
    used = 0 if config.experts is None else count[True] // config.experts.num_experts * config.experts.num_active
    return count[False], used


def matmul_parameters(config: ModelConfig) -> int:
    """Numbers that one token is multiplied with: matrices, of experts those in use, and the head; no embedding look-up."""
    return sum(layer_matmul_parameters(config)) + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int, *, num_adapted: int | None = None) -> float:
    """Floating-point operations to train on one token of a text of `seq_len` tokens, forward and backward.

    6 * N + 12 * L * H * D * K, the formula of PaLM (Chowdhery et al. 2022, appendix B), where N counts the numbers of
    the matrices and the head, and K is the keys that a query sees on average: (seq_len + 1) / 2 with a causal mask (PaLM
    counts the whole square), less in a layer with a window. A forward pass alone is a third of it. With adapters of
    `num_adapted` numbers and all else frozen, N makes no gradient of its own: 4 * N, and 6 for each of theirs.
    """
    attention = 0.0
    for layer in range(config.num_layers):
        attention += 12 * config.query_size * _mean_keys(seq_len, config.window(layer))
    if num_adapted is not None:
        return 4 * matmul_parameters(config) + 6 * num_adapted + attention
    return 6 * matmul_parameters(config) + attention


def _mean_keys(seq_len: int, window: int | None) -> float:
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def _mlp_width(config: ModelConfig, layer: int) -> int:
    """Inner numbers of one token in the layer's feed-forward; a routed one also keeps the token's inputs and outputs."""
    experts = config.experts
    if experts is None or not config.routes(layer):
        return config.mlp_size
    return experts.num_active * (experts.mlp_size + config.hidden_size)


def cache_bytes_per_token(config: ModelConfig, *, bytes_per_number: int) -> int:
    """Bytes of the KV cache for one token of one text."""
    return 2 * config.num_layers * config.kv_size * bytes_per_number


def muon_scratch_bytes(config: ModelConfig, *, compute_bytes: int) -> int:
    """What Muon's iteration holds beside its momentum, for the largest stack of hidden matrices of one shape.

    The stack normed and its result, each of the stack's size, and three products of it with itself (r x r of each r x c matrix).
    """
    stacks: dict[tuple[int, ...], int] = {}
    for name, shape in tensor_shapes(config).items():
        if name.startswith("layers.") and len(shape) == 2:
            stacks[shape] = stacks.get(shape, 0) + 1
    return max((n * min(s) * (2 * max(s) + 3 * min(s)) * compute_bytes for s, n in stacks.items()), default=0)


def layer_activation_bytes(config: ModelConfig, *, tokens: int, compute_bytes: int) -> int:
    """What autograd keeps of all layers: inputs of norms and matmuls, queries, keys, values, both mlp halves."""
    hidden, halves = config.hidden_size, 4 if config.gated_mlp else 2
    mlps = sum(_mlp_width(config, layer) for layer in range(config.num_layers)) * halves
    per_layer = 5 * hidden + 3 * config.query_size + 3 * config.kv_size
    return tokens * (config.num_layers * per_layer + mlps + 3 * hidden) * compute_bytes


def loss_bytes(config: ModelConfig, *, tokens: int, chunk_tokens: int = 1024) -> int:
    """A float32 block of `chunk_tokens` rows of the vocabulary, twice."""
    return 2 * min(tokens, chunk_tokens) * config.vocab_size * 4


@dataclass(frozen=True)
class TrainingMemory:
    """An estimate in bytes: what weights, gradients and optimizer hold throughout, and the activations of one micro-batch."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    update_bytes: int = 0
    """What the optimizer's step needs for itself, when the activations are gone."""

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + max(self.activation_bytes, self.update_bytes)


def training_memory(
    config: ModelConfig,
    *,
    tokens_per_micro_batch: int,
    compute_bytes: int,
    moments: float = 2.0,
    loss_chunk_tokens: int = 1024,
    num_adapted: int | None = None,
    update_bytes: int = 0,
) -> TrainingMemory:
    """Estimate the memory of training with float32 masters.

    `compute_bytes` is 2 for bf16 and 4 for float32: at 2 there is a copy of the weights beside the masters. `moments` is
    how many float32 numbers the optimizer keeps a parameter: 2 for AdamW, 1 for Muon. Activations are those of the layers,
    as much again for the layer whose gradients are being computed, and the loss in blocks of `loss_chunk_tokens`.
    With adapters of `num_adapted` numbers, those alone have masters, gradients and moments, and the frozen weights are held
    once. `update_bytes` is what a step of the optimizer needs for itself.
    """
    total = num_parameters(config).total
    layers = layer_activation_bytes(config, tokens=tokens_per_micro_batch, compute_bytes=compute_bytes)
    loss = loss_bytes(config, tokens=tokens_per_micro_batch, chunk_tokens=loss_chunk_tokens)
    trained = total if num_adapted is None else num_adapted
    frozen_bytes = 0 if num_adapted is None else total * compute_bytes
    return TrainingMemory(
        weight_bytes=trained * 4 + (trained * compute_bytes if compute_bytes < 4 else 0) + frozen_bytes,
        gradient_bytes=trained * compute_bytes,
        optimizer_bytes=int(trained * 4 * moments),
        activation_bytes=layers + layers // config.num_layers + loss,
        update_bytes=update_bytes,
    )
