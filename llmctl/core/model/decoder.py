"""The one decoder: token ids to hidden states to logits. Reads facts from ModelConfig; never a family's name.

Legend: B rows, T tokens a row, C hidden size, V vocabulary.

Parameters are plain and separate (q, k, v, o, gate, up, down are 2-D matrices of their own), because optimizers treat
matrices one by one: Muon orthogonalises each, and adapters and quantisers name them.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmctl.core.config.model import ModelConfig
from llmctl.core.model.attention import Pattern
from llmctl.core.model.cache import FixedPlace, KVCache, Place
from llmctl.core.model.dropout import Dropout
from llmctl.core.model.kernels import Lookup
from llmctl.core.model.layers import Layer, Norm
from llmctl.core.model.rope import Rope, inverse_frequencies


class Positions(nn.Module):
    """Absolute positions that are added to the embeddings: a learned table, or the fixed sinusoidal one, which is a buffer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._fixed = config.positions == "sinusoidal"
        table = torch.empty(config.max_positions, config.hidden_size)
        if self._fixed:
            self.register_buffer("weight", table)
        else:
            self.weight = nn.Parameter(table)

    def forward(self, positions: Tensor) -> Tensor:
        """(B, T) positions -> (B, T, C)."""
        return F.embedding(positions, self.weight)

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        """Normal for a learned table; the formula of Vaswani et al. 2017, section 3.5, for the fixed one."""
        with torch.no_grad():
            if self._fixed:
                self.weight.copy_(sinusoidal_table(config.max_positions, config.hidden_size))
            else:
                self.weight.normal_(std=config.initializer_range, generator=generator)


def sinusoidal_table(num_positions: int, size: int) -> Tensor:
    """Sines in the even columns and cosines in the odd ones, (num_positions, size) float32 (Vaswani et al. 2017, 3.5)."""
    rates = torch.exp(torch.arange(0, size, 2, dtype=torch.float64) * (-math.log(10_000.0) / size))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * rates
    table = torch.zeros(num_positions, size, dtype=torch.float64)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : size // 2]
    return table.float()


class Embedding(nn.Module):
    """The token embeddings, (V, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))


class Head(nn.Module):
    """The output head's own parameters: no weight when it shares that of the embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None


class Decoder(nn.Module):
    """A decoder-only transformer. Build it under `torch.device("meta")` to have shapes without memory.

    Weights are uninitialised until `init_weights` or a checkpoint fills them. With tied embeddings there is no
    `head.weight`: the head reads `embed.weight`, and no tensor appears twice in `state_dict`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.positions = Positions(config) if config.positions in ("learned", "sinusoidal") else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.final_norm = Norm(config.hidden_size, config)
        self.head = Head(config)
        self._ropes, self._rope_of = _rotations(config)
        self.recomputes = False
        """Whether training keeps the layers' inputs only and computes the rest a second time (Chen et al. 2016)."""

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the output head, (V, C): `embed.weight` when tied."""
        return self.embed.weight if self.head.weight is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        return self.head_weight.dtype

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill the weights as published: matrices and embeddings normal(0, initializer_range), biases 0, norms 1.

        With `scale_residual_init` the two matrices that write into the residual stream get a std divided by
        sqrt(2 * num_layers) (Radford et al. 2019). The order of drawing is that of `named_parameters`.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "positions.weight":
                    _init(name, parameter, self.config, generator)
        if self.positions is not None:
            self.positions.init_weights(self.config, generator)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, C), of `tokens` (B, T).

        `positions` (B, T), on the CPU, defaults to counting on from what the cache holds, from 0 without one, and from 0
        in each document. With a `cache`, row b goes on with the text of slot `slots[b]` (distinct; default row number),
        keys and values are stored, and a position of -1 marks padding: not stored, its output meaningless.
        `document_lengths`, one tuple a row, each adding up to T, keeps attention within documents. `dropout` is for
        training. Raises ValueError for a position beyond the cache or, with absolute positions, beyond the table.
        """
        batch, num_tokens = tokens.shape
        place = None
        if cache is not None:
            if document_lengths is not None:
                raise ValueError("a cache holds one text a slot: document_lengths cannot be given with it")
            slots = torch.arange(batch) if slots is None else slots.cpu()
            if positions is None:
                positions = cache.lengths[slots][:, None] + torch.arange(num_tokens)
            positions = positions.cpu()
            place = Place(cache, slots, positions)
            pattern = Pattern(query_positions=positions, same_start=place.same_start)
        else:
            if positions is None:
                positions = _counted(num_tokens, document_lengths)
            positions = positions.cpu()
            pattern = Pattern(document_lengths=document_lengths)
        x = _look_up(tokens, self.embed.weight)
        if self.config.embedding_multiplier != 1.0:
            x = x * self._embedding_multiplier(x.dtype)
        if self.positions is not None:
            if int(positions.max()) >= self.config.max_positions:
                raise ValueError(f"position {int(positions.max())} is beyond the {self.config.max_positions} that the model has")
            x = x + self.positions(positions.clamp(min=0).to(x.device))
        angles = [rope.cos_sin(positions, dtype=x.dtype, device=x.device) for rope in self._ropes]
        if dropout is not None:
            x = dropout(x, 2 * self.config.num_layers)
        for layer, rope in zip(self.layers, self._rope_of, strict=True):
            inputs = (x, None if rope is None else angles[rope], pattern, cache, place, dropout)
            if self.recomputes and cache is None and torch.is_grad_enabled():
                # dropout is a pure function, so that no generator's state need be kept
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        if cache is not None and slots is not None:
            last = positions.amax(dim=1)
            cache.lengths[slots] = torch.where(last >= 0, last + 1, cache.lengths[slots])
        result: Tensor = self.final_norm(x)
        return result

    def _embedding_multiplier(self, dtype: torch.dtype) -> float:
        """Rounded to the weights' dtype first, as Gemma was trained: sqrt(640) is 25.25 in bf16."""
        return float(torch.tensor(self.config.embedding_multiplier, dtype=dtype))

    def fixed_length(self, num_positions: int) -> int:
        """The longest text, of `num_positions` at most, that `fixed_step` can go on with; 0 for a model that it cannot run."""
        if self.config.experts is not None:  # how many tokens an expert gets decides shapes
            return 0
        return min([num_positions, *(rope.longest or num_positions for rope in self._ropes)])

    def fixed_tables(self, num_positions: int) -> list[tuple[Tensor, Tensor]]:
        """The tables of angles that `fixed_step` reads, one a rotation, for texts of up to `num_positions`."""
        return [rope.table(num_positions, dtype=self.dtype, device=self.device) for rope in self._ropes]

    def fixed_step(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        slots: Tensor,
        *,
        num_keys: int,
        in_order: bool,
        tables: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits (B, V) after one more token in each row: `forward` in a form whose shapes, and whose work, no value decides.

        `tokens`, `positions` and `slots` (B,) lie on the device; `num_keys` is more than every position; see FixedPlace.
        `cache.lengths` stays as it is. Nothing is checked, since that would wait for the device.
        """
        place = FixedPlace(slots, positions, num_keys=num_keys, in_order=in_order)
        pattern = Pattern(query_positions=positions[:, None])
        x = F.embedding(tokens[:, None], self.embed.weight)  # (B, 1, C)
        if self.config.embedding_multiplier != 1.0:
            x = x * self._embedding_multiplier(x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions[:, None])
        angles = [(cos[positions][:, None, None], sin[positions][:, None, None]) for cos, sin in tables]  # (B, 1, 1, R/2)
        for layer, rope in zip(self.layers, self._rope_of, strict=True):
            x = layer(x, None if rope is None else angles[rope], pattern, cache, place)
        return self.logits(self.final_norm(x)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., V), of `hidden` (..., C)."""
        logits = F.linear(hidden, self.head_weight, self.head.bias)
        if self.config.logit_multiplier != 1.0:
            logits = logits * self.config.logit_multiplier
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T); see `hidden`."""
        return self.logits(self.hidden(tokens, positions=positions, cache=cache, slots=slots, document_lengths=document_lengths))


def drawn_weights(config: ModelConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """What `init_weights` fills in, a float32 tensor at a time, for a model that is never whole in one place."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
    learned = shapes.pop("positions.weight", None)
    for name, shape in shapes.items():
        yield name, _init(name, torch.empty(shape), config, generator)
    if learned is not None:
        yield "positions.weight", torch.empty(learned).normal_(std=config.initializer_range, generator=generator)


def _init(name: str, tensor: Tensor, config: ModelConfig, generator: torch.Generator | None) -> Tensor:
    """Fill one tensor; see Decoder.init_weights."""
    std = config.initializer_range
    if name.endswith((".o.weight", ".down.weight")):
        return tensor.normal_(std=std / math.sqrt(2 * config.num_layers) if config.scale_residual_init else std, generator=generator)
    if name.endswith("norm.weight"):
        return tensor.fill_(0.0 if config.norm_plus_one else 1.0)
    return tensor.zero_() if name.endswith("bias") else tensor.normal_(std=std, generator=generator)


def _rotations(config: ModelConfig) -> tuple[list[Rope], list[int | None]]:
    """The rotations of the model, and which of them each layer uses: none, the usual one, or that of layers with a window."""
    if config.positions != "rope":
        return [], [None] * config.num_layers
    ropes = [Rope(config)]
    if config.local_rope_theta is not None:
        ropes.append(Rope(dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)))
    rotates = config.rope_layers or (True,) * config.num_layers
    local = len(ropes) - 1
    return ropes, [(0 if config.window(i) is None else local) if rotates[i] else None for i in range(config.num_layers)]


def rotations(config: ModelConfig) -> list[tuple[Tensor, float]]:
    """Angles per position of each pair, (R/2,), and factor, of each rotation in the model: the usual one, that of layers with a window."""
    if config.positions != "rope":
        return []
    local = config.local_rope_theta
    kinds = [config] if local is None else [config, dataclasses.replace(config, rope_theta=local, rope_scaling=None)]
    return [inverse_frequencies(kind) for kind in kinds]


def _look_up(tokens: Tensor, weight: Tensor) -> Tensor:
    """(B, T) tokens, (V, C) weight -> (B, T, C)."""
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu" and torch.is_grad_enabled():
        looked_up: Tensor = Lookup.apply(tokens, weight)  # type: ignore[no-untyped-call]
        return looked_up
    return F.embedding(tokens, weight)


def _counted(num_tokens: int, document_lengths: Sequence[Sequence[int]] | None) -> Tensor:
    """Positions (1 or B, T) that count from 0 in each row or document."""
    if document_lengths is None:
        return torch.arange(num_tokens)[None]
    for row, lengths in enumerate(document_lengths):
        if sum(lengths) != num_tokens:
            raise ValueError(f"row {row}: documents of {sum(lengths)} tokens in all do not fill {num_tokens}")
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in document_lengths])
