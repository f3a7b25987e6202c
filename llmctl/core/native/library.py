"""The C++ library as Python sees it: its structs, its functions, packed matrices. Knows arrays; knows no model.

Every struct mirrors one of native.h, field by field; `load` refuses a library whose structs have other sizes.
"""

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.native.memory import Memory
from llmctl.core.sharedlib import ABI, Unavailable, open_library, other_version

LANES = 16
"""Output rows of a packed block."""
FLOAT32, BFLOAT16, INT8, INT4, FLOAT16 = 0, 1, 2, 3, 4
"""Kinds of weights; FLOAT16, of caches only. bf16 numbers are held as uint16, since numpy has no bf16."""
GROUP = 32
"""Inputs that share a scale."""
ISA_VARIABLE = "LLMCTL_NATIVE_ISA"
"""Environment: the kernels to use, one of KERNEL_NAMES, instead of the best that the CPU can run."""
KERNEL_NAMES = ("avx512bf16", "avx512", "avxvnni", "avx2", "baseline")
"""The best first; "avxvnni" is AVX2 with AVX-VNNI."""


class Matrix(ctypes.Structure):
    """A packed matrix: native.h's Matrix."""

    _fields_ = [
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("minimums", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("unused", c_int32),
    ]


class Mlp(ctypes.Structure):
    """native.h's Mlp."""

    _fields_ = [(name, Matrix) for name in ("gate", "up", "down")]


class Layer(ctypes.Structure):
    """native.h's Layer."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out")),
        ("mlp", Mlp),
        ("router", Matrix),
        ("experts", POINTER(Mlp)),
        *((name, c_void_p) for name in ("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("attn_post_norm", "attn_post_norm_bias", "mlp_post_norm", "mlp_post_norm_bias")),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        ("window", c_int64),
        ("rotates", c_int64),
    ]


class Model(ctypes.Structure):
    """native.h's Model."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "rotary_size"),
                *("activation", "gated_mlp", "layer_norm", "cache_kind", "parallel_residual", "whole_qk_norm"),
                *("num_experts", "num_active_experts", "expert_size", "normalised_experts"),
            )
        ),
        *(
            (name, c_float)
            for name in (
                *("norm_eps", "attention_scale", "attention_softcap", "logit_softcap"),
                *("embedding_multiplier", "residual_multiplier", "logit_multiplier", "unused"),
            )
        ),
        *((name, c_void_p) for name in ("positions", "final_norm", "final_norm_bias")),
        ("layers", POINTER(Layer)),
        ("cache_capacity", c_int64),
        ("embed", Matrix),
        ("head", Matrix),
    ]


class Step(ctypes.Structure):
    """native.h's Step."""

    _fields_ = [
        ("num_tokens", c_int64),
        *((name, c_void_p) for name in ("tokens", "positions", "slots", "wants_logits", "local_cosines", "local_sines")),
        *((name, c_void_p) for name in ("cosines", "sines", "long_cosines", "long_sines", "is_long", "logits")),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llmctl_kernels": (c_char_p, [c_char_p]),
    "llmctl_open": (c_void_p, [c_char_p, c_int32]),
    "llmctl_close": (None, [c_void_p]),
    "llmctl_step": (c_int32, [c_void_p, POINTER(Model), POINTER(Step)]),
    "llmctl_pack": (None, [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64]),
    "llmctl_multiply": (c_int32, [c_void_p, POINTER(Matrix), c_void_p, c_int32, c_void_p]),
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library, checked. Raises Unavailable that says why there is none."""
    library = open_library()
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise Unavailable(f"the native library cannot be loaded: {error}") from error
    sizes = [ctypes.sizeof(struct) for struct in (Matrix, Layer, Model, Step)]
    if library.llmctl_abi() != ABI * 1_000_000_000 + sizes[0] * 1_000_000 + sizes[1] * 1000 + sizes[2] + sizes[3]:
        raise other_version()
    return library


def kernels() -> str:
    """The name of the kernels that will run. Raises Unavailable for a forced name that this CPU or build does not have."""
    forced = os.environ.get(ISA_VARIABLE) or None
    found: bytes | None = load().llmctl_kernels(None if forced is None else forced.encode("utf-8", "surrogateescape"))
    if found is None:
        raise Unavailable(f"{ISA_VARIABLE}={forced}: this CPU has no such kernels; the names are {', '.join(KERNEL_NAMES)}")
    return found.decode()


class Session:
    """The library's threads and working memory for one executor; freed with this object."""

    def __init__(self, num_threads: int) -> None:
        self._library = load()
        self.kernels = kernels()
        self._memory = Memory()
        self.num_threads = num_threads
        self._handle: int | None = self._library.llmctl_open(self.kernels.encode(), num_threads)
        if self._handle is None:
            raise Unavailable(f"{num_threads} threads cannot be started")

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            self._library.llmctl_close(handle)

    def step(self, model: Model, step: Step) -> None:
        """Run one step. Raises MemoryError."""
        if self._library.llmctl_step(self._handle, model, step):
            raise MemoryError("no memory for the numbers of one step")

    def pack(self, parts: list[NDArray[Any]], *, kind: int, biases: list[NDArray[np.float32]] | None = None) -> "PackedMatrix":
        """Pack matrices (outputs, inputs) of float32 or bf16 (uint16), any strides, one below the other. Raises MemoryError."""
        outputs, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
        layout = packed_layout(kind, outputs, inputs)
        weights = self._memory.zeros(*layout["weights"])
        self._place(parts, kind, weights)
        return PackedMatrix(kind, outputs, inputs, weights, bias=_padded_bias(biases, outputs))

    def pack_quantised(
        self, parts: "Sequence[Int8Matrix | Int4Matrix]", *, biases: list[NDArray[np.float32]] | None = None
    ) -> "PackedMatrix":
        """Pack quantised matrices of one kind, one below the other. Raises MemoryError."""
        kind = INT8 if isinstance(parts[0], Int8Matrix) else INT4
        outputs, inputs = sum(len(part.codes) for part in parts), parts[0].num_columns
        centred = all(isinstance(part, Int4Matrix) and part.is_centred() for part in parts)
        layout = packed_layout(kind, outputs, inputs, has_minimums=not centred)
        arrays = {name: self._memory.zeros(*layout[name]) for name in layout}
        self._place([np.ascontiguousarray(part.codes).view(np.uint32) for part in parts], kind, arrays["weights"])
        if kind == INT8:
            arrays["weights"] ^= np.uint8(128)
        for name in layout:
            if name != "weights":
                halves = [np.ascontiguousarray(getattr(part, name), dtype=np.float16).view(np.uint16) for part in parts]
                self._place(halves, FLOAT16, arrays[name])
        return PackedMatrix(kind, outputs, inputs, **arrays, bias=_padded_bias(biases, outputs))

    def _place(self, parts: list[NDArray[Any]], kind: int, packed: NDArray[Any]) -> None:
        """Numbers of matrices that lie one below the other into a packed array."""
        row = 0
        for part in parts:
            source_kind = FLOAT32 if part.dtype == np.float32 else BFLOAT16
            self._library.llmctl_pack(
                *(self._handle, kind, packed.ctypes.data, row, *part.shape, part.ctypes.data, source_kind),
                *(stride // part.itemsize for stride in part.strides),
            )
            row += part.shape[0]

    def multiply(self, matrix: "PackedMatrix", x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (rows, inputs) times the matrix, plus its bias: (rows, outputs). Raises MemoryError."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.empty((x.shape[0], matrix.outputs), dtype=np.float32)
        if self._library.llmctl_multiply(self._handle, matrix.struct(), x.ctypes.data, x.shape[0], y.ctypes.data):
            raise MemoryError("no memory for quantised rows")
        return y


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in groups of 32 along its columns: codes (R, 32 G) int8 and scales (R, G) float16; a number is scale * code."""

    codes: NDArray[np.int8]
    scales: NDArray[Any]
    num_columns: int


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix in groups of 32 along its columns: a number is scale * code + minimum.

    `codes` are uint8 (R, 16 G), whose byte j of a group holds column j in its low half and column j + 16 in its high half;
    `scales` and `minimums` are float16 (R, G).
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    minimums: NDArray[Any]
    num_columns: int

    def is_centred(self) -> bool:
        """Whether each minimum is -8 times its scale, as in Q4_0: then it need not be held."""
        with np.errstate(over="ignore", invalid="ignore"):
            expected = np.asarray(self.scales, np.float16) * np.float16(-8)
        return np.array_equal(np.asarray(self.minimums, np.float16), expected, equal_nan=True)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in the library's layout: the arrays of `packed_layout`, at multiples of 64 bytes, better in huge pages (memory.py)."""

    kind: int
    outputs: int
    inputs: int
    weights: NDArray[Any]
    scales: NDArray[Any] | None = None
    minimums: NDArray[Any] | None = None
    bias: NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are there, by name."""
        found = {name: getattr(self, name) for name in ("weights", "scales", "minimums", "bias")}
        return {name: array for name, array in found.items() if array is not None}

    def check(self) -> None:
        """Raise ValueError unless the arrays are those of the layout: the library would read beyond them."""
        wanted = packed_layout(self.kind, self.outputs, self.inputs, has_minimums=self.minimums is not None, has_bias=self.bias is not None)
        arrays = self.arrays()
        if wanted.keys() != arrays.keys() or any((array.shape, array.dtype) != wanted[name] for name, array in arrays.items()):
            raise ValueError(f"no packed matrix of kind {self.kind}, {self.outputs} x {self.inputs}")

    def with_bias(self, bias: NDArray[np.float32] | None) -> "PackedMatrix":
        """The same matrix, in the same memory, with another bias (outputs,), or none."""
        return dataclasses.replace(self, bias=_padded_bias(None if bias is None else [bias], self.outputs))

    def struct(self) -> Matrix:
        """The C struct; valid as long as the arrays live."""
        pointers = {name: array.ctypes.data for name, array in self.arrays().items()}
        return Matrix(kind=self.kind, outputs=self.outputs, inputs=self.inputs, **pointers)


def packed_layout(
    kind: int, outputs: int, inputs: int, *, has_minimums: bool = True, has_bias: bool = False
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> (shape, dtype) of the arrays of a packed matrix (outputs, inputs); native.h says what stands where.

    Minimums are int4's, and there are none where each is -8 times its scale.
    """
    blocks, groups = -(-outputs // LANES), -(-inputs // GROUP)
    layout: dict[str, tuple[tuple[int, ...], Any]]
    if kind == FLOAT32:
        layout = {"weights": ((blocks, inputs, LANES), np.float32)}
    elif kind == BFLOAT16:
        layout = {"weights": ((blocks, -(-inputs // 2), LANES, 2), np.uint16)}
    else:
        layout = {"weights": ((blocks, (8 if kind == INT8 else 4) * groups, LANES, 4), np.uint8)}
        layout["scales"] = ((blocks, groups, LANES), np.float16)
        if kind == INT4 and has_minimums:
            layout["minimums"] = ((blocks, groups, LANES), np.float16)
    if has_bias:
        layout["bias"] = ((blocks * LANES,), np.float32)
    return layout


def _padded_bias(biases: list[NDArray[np.float32]] | None, outputs: int) -> NDArray[np.float32] | None:
    if biases is None:
        return None
    bias = np.zeros(-(-outputs // LANES) * LANES, dtype=np.float32)
    bias[:outputs] = np.concatenate(biases)
    return bias


def kind_of(array: NDArray[Any]) -> int:
    """FLOAT32 or BFLOAT16, from the dtype of an array."""
    if array.dtype not in (np.float32, np.uint16):
        raise ValueError(f"float32 or bf16 (uint16) is wanted, {array.dtype} was given")
    return FLOAT32 if array.dtype == np.float32 else BFLOAT16


def from_bf16(array: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 to float32, exactly."""
    return (np.ascontiguousarray(array).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)
