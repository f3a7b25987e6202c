"""The engine's executor on the native library: a model's facts and arrays to logits. Knows no file, no text, no torch.

A text's logits are the same bits whatever stands beside it in a call and however its prompt is cut into calls.

Legend: B rows of a call, T tokens a row, S slots, Hkv key-value heads, D head size, V vocabulary size, R rotated size.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig
from llmctl.core.native.cache import CACHE_KINDS, Cache, CacheDtype
from llmctl.core.native.library import LANES, Layer, Mlp, Model, Session, Step
from llmctl.core.native.packed import PackedModel

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_MAX_SIZE = 1 << 30
_MAX_HEAD_SIZE = 1024

Angles = Callable[[int], dict[str, NDArray[np.float32]]]
"""Number of positions -> the tables of cosines and sines, (positions, R / 2) each, under the names of native.h's Step."""


def supports(config: ModelConfig) -> str | None:
    """Why the library cannot run a model, or None when it can."""
    if config.activation not in _ACTIVATIONS:
        return f"the activation {config.activation} is not in the native library"
    expert_size = 0 if config.experts is None else config.experts.mlp_size
    projected = config.query_size + 2 * config.kv_size
    if max(config.vocab_size, config.hidden_size, config.mlp_size, expert_size, projected, config.max_positions) > _MAX_SIZE:
        return "the model is too large for the native library"
    if config.head_dim > _MAX_HEAD_SIZE:
        return f"heads of {config.head_dim} are too large for the native library"
    return None


class NativeExecutor:
    """Runs the native library over a cache that grows on demand. See `core/infer/executor.py` for the contract.

    Arithmetic is in float32, but that inputs of int8 and 4-bit matrices are quantised to int8 as they come. `cache_dtype` is how
    keys and values are held; None: float32 where all matrices are float32, else float16. `angles` gives the rotary angles of a
    model that has them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedModel,
        *,
        angles: Angles | None,
        num_threads: int = 1,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        if (reason := supports(config)) is not None:
            raise ValueError(reason)
        self.config = config
        self._session = Session(num_threads)
        self._angles = angles
        self._angle_tables: dict[str, NDArray[np.float32]] = {}
        self._longest_short_text = config.longest_short_text
        self._weights = weights  # what the structs point to
        if cache_dtype is None:
            cache_dtype = "float16" if weights.is_narrow else "float32"
        self._experts: list[Any] = []
        self._layers = (Layer * config.num_layers)(*(self._layer(i) for i in range(config.num_layers)))
        self._cache = Cache(dtype=cache_dtype, num_layers=config.num_layers, num_heads=config.num_kv_heads, head_dim=config.head_dim)
        self._model = self._whole()

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """The longest text that the model was made for, in tokens."""
        return self.config.max_positions

    @property
    def kernels(self) -> str:
        """The kernels that run: one of library.py's KERNEL_NAMES."""
        return self._session.kernels

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return self._session.num_threads

    @property
    def cache_dtype(self) -> CacheDtype:
        """How keys and values are held."""
        return self._cache.dtype

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """At least that many slots of at least that many tokens. Raises MemoryError."""
        cache = self._cache
        if cache.num_slots >= num_slots and cache.capacity >= capacity:
            return
        capacity = -(-max(capacity, cache.capacity) // LANES) * LANES
        cache.grow(num_slots=max(num_slots, cache.num_slots), capacity=capacity)
        cache.point(self._layers)
        self._model.cache_capacity = capacity

    def release(self) -> None:
        """Forget the cache."""
        self._cache.release()

    def step(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        *,
        lengths: NDArray[np.int64] | None = None,
        all_logits: bool = False,
    ) -> NDArray[np.float32]:
        """Feed tokens (B, T), give logits (B, V) or (B, T, V). See `Executor.step`.

        Raises ValueError for a token, slot or position that is not there: the library would read beyond its memory.
        """
        batch, num_tokens = tokens.shape
        counts = np.full(batch, num_tokens, dtype=np.int64) if lengths is None else lengths
        self._check(tokens, positions, slots, counts)
        valid = np.arange(num_tokens) < counts[:, None]  # (B, T)
        flat_positions = np.ascontiguousarray((positions[:, None] + np.arange(num_tokens))[valid], dtype=np.int32)
        flat_tokens = np.ascontiguousarray(tokens[valid], dtype=np.int32)
        flat_slots = np.repeat(slots, counts).astype(np.int32)
        wants = np.ones(len(flat_tokens), dtype=np.uint8)
        if not all_logits:
            wants[:] = 0
            wants[np.cumsum(counts) - 1] = 1
        logits = np.empty((int(wants.sum()), self.vocab_size), dtype=np.float32)
        step = Step(
            num_tokens=len(flat_tokens),
            tokens=flat_tokens.ctypes.data,
            positions=flat_positions.ctypes.data,
            slots=flat_slots.ctypes.data,
            wants_logits=wants.ctypes.data,
            logits=logits.ctypes.data,
        )
        if self._angles is not None:
            for name, table in self._angles_up_to(int(flat_positions.max()) + 1).items():
                setattr(step, name, table.ctypes.data)
        if self._longest_short_text is not None:  # as on torch, a text's length in this call decides for all its tokens in it
            is_long = np.repeat(positions + counts > self._longest_short_text, counts).astype(np.uint8)
            step.is_long = is_long.ctypes.data
        self._session.step(self._model, step)
        if not all_logits:
            return logits
        if lengths is None:
            return logits.reshape(batch, num_tokens, -1)
        padded = np.zeros((batch, num_tokens, self.vocab_size), dtype=np.float32)
        padded[valid] = logits
        return padded

    def copy_slot(self, source: int, *, to: int, length: int) -> None:
        """Copy the first `length` tokens of a slot."""
        self._cache.copy(source, to=to, length=length)

    def _check(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        if not 1 <= int(counts.min()) <= int(counts.max()) <= tokens.shape[1]:
            raise ValueError(f"rows of {tokens.shape[1]} tokens cannot hold {counts.tolist()}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.vocab_size}")
        if int(slots.min()) < 0 or int(slots.max()) >= self._cache.num_slots:
            raise ValueError(f"a slot is not among the {self._cache.num_slots} reserved ones")
        longest = int((positions + counts).max())
        if int(positions.min()) < 0 or longest > self._cache.capacity:
            raise ValueError(f"position {longest - 1} does not fit a cache of {self._cache.capacity}")
        if self._model.positions and longest > self.max_positions:
            raise ValueError(f"position {longest - 1} is beyond the {self.max_positions} that the model has")

    def _angles_up_to(self, num_positions: int) -> dict[str, NDArray[np.float32]]:
        tables = self._angle_tables
        if not tables or len(tables["cosines"]) < num_positions:
            assert self._angles is not None
            rounded = 1 << max(8, (num_positions - 1).bit_length())
            found = self._angles(rounded)
            tables = self._angle_tables = {name: np.ascontiguousarray(table, np.float32) for name, table in found.items()}
        return tables

    def _whole(self) -> Model:
        config, matrices = self.config, self._weights.matrices
        embed = matrices["embed"]
        head = matrices.get("head")
        if head is None:
            head = self._tied_head = embed.with_bias(self._weights.vectors.get("head_bias"))
        return Model(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            mlp_size=config.mlp_size,
            rotary_size=config.rotary_size if config.positions == "rope" else 0,
            activation=_ACTIVATIONS[config.activation],
            gated_mlp=config.gated_mlp,
            layer_norm=config.norm == "layer",
            cache_kind=CACHE_KINDS[self._cache.dtype],
            parallel_residual=config.parallel_residual,
            whole_qk_norm=config.qk_norm_whole,
            num_experts=0 if config.experts is None else config.experts.num_experts,
            num_active_experts=0 if config.experts is None else config.experts.num_active,
            expert_size=0 if config.experts is None else config.experts.mlp_size,
            normalised_experts=config.experts is not None and config.experts.normalised,
            norm_eps=config.norm_eps,
            attention_scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            attention_softcap=config.attention_softcap or 0.0,
            logit_softcap=config.logit_softcap or 0.0,
            embedding_multiplier=config.embedding_multiplier,
            residual_multiplier=config.residual_multiplier,
            logit_multiplier=config.logit_multiplier,
            positions=self._vector("positions"),
            final_norm=self._vector("final_norm"),
            final_norm_bias=self._vector("final_norm_bias"),
            layers=ctypes.cast(self._layers, ctypes.POINTER(Layer)),
            embed=embed.struct(),
            head=head.struct(),
        )

    def _layer(self, index: int) -> Layer:
        config, matrices, name = self.config, self._weights.matrices, f"layers.{index}"
        norms = [f"{place}{kind}" for place in ("attn", "mlp") for kind in ("_norm", "_post_norm")]
        names = (*norms, *(f"{name}_bias" for name in norms), "q_norm", "k_norm")
        rotates = config.positions == "rope" and (config.rope_layers is None or config.rope_layers[index])
        is_local = config.local_rope_theta is not None and config.window(index) is not None
        layer = Layer(
            qkv=matrices[f"{name}.qkv"].struct(),
            out=matrices[f"{name}.out"].struct(),
            **{part: self._vector(f"{name}.{part}") for part in names},
            window=config.window(index) or 0,
            rotates=(2 if is_local else 1) if rotates else 0,
        )
        if config.experts is not None and config.routes(index):
            count = config.experts.num_experts
            experts = (Mlp * count)(*(self._mlp(f"{name}.experts.{expert}") for expert in range(count)))
            self._experts.append(experts)
            layer.router, layer.experts = matrices[f"{name}.router"].struct(), ctypes.cast(experts, ctypes.POINTER(Mlp))
        else:
            layer.mlp = self._mlp(name)
        return layer

    def _mlp(self, name: str) -> Mlp:
        parts = ("gate", "up", "down") if self.config.gated_mlp else ("up", "down")
        return Mlp(**{part: self._weights.matrices[f"{name}.{part}"].struct() for part in parts})

    def _vector(self, name: str) -> int | None:
        """The address of a vector, None where the model has none."""
        vector = self._weights.vectors.get(name)
        return None if vector is None else int(vector.ctypes.data)
