"""A model's weights in the library's layout: packed matrices and float32 vectors by name. Knows ModelConfig and arrays; no file.

Names of matrices: "embed", "head" (of a model whose head is not its embeddings), "layers.3.qkv", ".out", ".gate", ".up", ".down",
and in a layer with experts "layers.3.router", "layers.3.experts.5.gate", ".up", ".down" in place of the last three.
Names of vectors: "positions", "final_norm", "final_norm_bias", "head_bias", "layers.3.attn_norm", ".attn_post_norm", ".mlp_norm",
".mlp_post_norm", each with "_bias" where there is one, ".q_norm", ".k_norm".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.core.config.model import ModelConfig
from llmctl.core.native.library import (
    BFLOAT16,
    FLOAT32,
    Int4Matrix,
    Int8Matrix,
    PackedMatrix,
    Session,
    from_bf16,
    kind_of,
    to_bf16,
)

HeldDtype = Literal["float32", "bfloat16"]
_KINDS: dict[HeldDtype, int] = {"float32": FLOAT32, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class PackedModel:
    """All weights of a model as the library reads them."""

    matrices: Mapping[str, PackedMatrix]
    vectors: Mapping[str, NDArray[np.float32]]

    @property
    def is_narrow(self) -> bool:
        """Whether any matrix is held in fewer bits than float32 has."""
        return any(matrix.kind != FLOAT32 for matrix in self.matrices.values())

    @property
    def num_bytes(self) -> int:
        """What the weights take in memory."""
        arrays = [array for matrix in self.matrices.values() for array in matrix.arrays().values()]
        return sum(array.nbytes for array in [*arrays, *self.vectors.values()])


@dataclass(frozen=True)
class _Group:
    """One packed matrix: the tensors that lie in it, one below the other, and their biases, None where there is none."""

    name: str
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.weights, *(bias for bias in self.biases if bias is not None))


def pack_model(config: ModelConfig, tensors: Iterable[tuple[str, Any]], *, dtype: HeldDtype, num_threads: int = 1) -> PackedModel:
    """Pack the decoder's tensors (model/facts.py), each matrix as soon as all that lies in it has come.

    A tensor is float32, or bf16 as uint16, with any strides, or an Int8Matrix or Int4Matrix; the matrices of one product (q, k
    and v) are of one kind. `dtype` is how matrices are held that come as floats; vectors are rounded to it and held in float32.
    Raises Unavailable without a library, MemoryError, and ValueError when a tensor is missing.
    """
    session = Session(num_threads)
    kind = _KINDS[dtype]
    groups = {tensor: group for group in _groups(config) for tensor in group.tensors}
    pending: dict[str, Any] = {}
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors:
        if name not in groups:
            vectors[_vector_name(name)] = _vector(config, name, tensor, kind)
            continue
        pending[name] = tensor
        group = groups[name]
        if all(part in pending for part in group.tensors):
            matrices[group.name] = _packed(session, group, pending, kind)
            for part in group.tensors:
                del pending[part]
    missing = sorted({group.name for group in groups.values()} - matrices.keys())
    if missing:
        raise ValueError(f"tensors of {missing[0]!r} are missing")
    return PackedModel(matrices, vectors)


def check_packed(config: ModelConfig, packed: PackedModel) -> None:
    """Raise ValueError unless these are weights of such a model: the library would read beyond those of another."""
    for matrix in packed.matrices.values():
        matrix.check()
    hidden, layers = config.hidden_size, [f"layers.{index}" for index in range(config.num_layers)]
    parts = ("gate", "up") if config.gated_mlp else ("up",)
    sizes = {"embed": (config.vocab_size, hidden)} | ({} if config.tie_embeddings else {"head": (config.vocab_size, hidden)})
    vectors: dict[str, tuple[int, ...]] = {"final_norm": (hidden,)}
    if config.positions in ("learned", "sinusoidal"):
        vectors["positions"] = (config.max_positions, hidden)
    norms = (["attn_norm", "mlp_norm"] if config.pre_norms else []) + (["attn_post_norm", "mlp_post_norm"] if config.post_norms else [])
    over = (
        {"q_norm": config.query_size, "k_norm": config.kv_size}
        if config.qk_norm_whole
        else dict.fromkeys(("q_norm", "k_norm"), config.head_dim)
    )
    optional: dict[str, tuple[int, ...]] = {"final_norm_bias": (hidden,), "head_bias": (config.vocab_size,)}
    for index, layer in enumerate(layers):
        sizes[f"{layer}.qkv"] = (config.query_size + 2 * config.kv_size, hidden)
        sizes[f"{layer}.out"] = (hidden, config.query_size)
        if config.experts is not None and config.routes(index):
            sizes[f"{layer}.router"] = (config.experts.num_experts, hidden)
        for mlp, size in _mlps(config, index):
            sizes |= {f"{mlp}.{name}": (size, hidden) for name in parts} | {f"{mlp}.down": (hidden, size)}
        vectors |= {f"{layer}.{name}": (hidden,) for name in norms}
        optional |= {f"{layer}.{name}_bias": (hidden,) for name in norms}
        if config.qk_norm or config.qk_norm_whole:
            vectors |= {f"{layer}.{name}": (size,) for name, size in over.items()}
    if {name: (matrix.outputs, matrix.inputs) for name, matrix in packed.matrices.items()} != sizes:
        raise ValueError("matrices of another model")
    found = {name: vector.shape for name, vector in packed.vectors.items()}
    if not vectors.items() <= found.items() <= (vectors | optional).items():
        raise ValueError("vectors of another model")
    if any(vector.dtype != np.float32 for vector in packed.vectors.values()):
        raise ValueError("vectors of another dtype")


def _groups(config: ModelConfig) -> Iterator[_Group]:
    """The packed matrices of a model that the library can run."""

    def group(name: str, *parts: str, bias: bool) -> _Group:
        return _Group(name, tuple(f"{part}.weight" for part in parts), tuple(f"{part}.bias" if bias else None for part in parts))

    yield group("embed", "embed", bias=False)
    if not config.tie_embeddings:
        yield group("head", "head", bias=config.head_bias)
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        yield group(f"{layer}.qkv", f"{layer}.attn.q", f"{layer}.attn.k", f"{layer}.attn.v", bias=config.qkv_bias)
        yield group(f"{layer}.out", f"{layer}.attn.o", bias=config.attention_out_bias)
        if config.routes(index):
            yield group(f"{layer}.router", f"{layer}.mlp.router", bias=False)
        for mlp, _ in _mlps(config, index):
            inside = mlp.removeprefix(layer)  # "", or ".experts.5"
            for part in ("gate", "up", "down") if config.gated_mlp else ("up", "down"):
                yield group(f"{mlp}.{part}", f"{layer}.mlp{inside}.{part}", bias=config.mlp_bias)


def _mlps(config: ModelConfig, layer: int) -> Iterator[tuple[str, int]]:
    """Name and inner size of each mlp of a layer: its own, or those of its experts."""
    if config.experts is None or not config.routes(layer):
        yield f"layers.{layer}", config.mlp_size
        return
    for expert in range(config.experts.num_experts):
        yield f"layers.{layer}.experts.{expert}", config.experts.mlp_size


def _packed(session: Session, group: _Group, tensors: Mapping[str, Any], kind: int) -> PackedMatrix:
    parts = [tensors[name] for name in group.weights]
    given = None
    if any(name is not None for name in group.biases):
        rows = [len(part.codes if isinstance(part, Int8Matrix | Int4Matrix) else part) for part in parts]
        pairs = zip(rows, group.biases, strict=True)
        given = [np.zeros(count, np.float32) if name is None else rounded(tensors[name], kind) for count, name in pairs]
    if isinstance(parts[0], Int8Matrix | Int4Matrix):
        return session.pack_quantised(parts, biases=given)
    return session.pack(parts, kind=kind, biases=given)


def _vector_name(tensor: str) -> str:
    """ "layers.3.attn.q_norm.weight" -> "layers.3.q_norm", "final_norm.bias" -> "final_norm_bias"."""
    name = tensor.replace(".attn.", ".")
    return name.removesuffix(".weight") if name.endswith(".weight") else name.removesuffix(".bias") + "_bias"


def _vector(config: ModelConfig, name: str, tensor: NDArray[Any], kind: int) -> NDArray[np.float32]:
    values = rounded(tensor, kind)
    is_scale = name.endswith("norm.weight")
    is_rms = config.norm == "rms" or name.endswith(("q_norm.weight", "k_norm.weight"))
    return np.ascontiguousarray(values + np.float32(1.0) if is_scale and is_rms and config.norm_plus_one else values)


def rounded(array: NDArray[Any], kind: int) -> NDArray[np.float32]:
    """In float32, with no more precision than matrices of that kind have, so that a model of one dtype is one model."""
    if kind_of(array) == BFLOAT16:
        return from_bf16(array)
    return np.ascontiguousarray(array) if kind == FLOAT32 else from_bf16(to_bf16(array))
