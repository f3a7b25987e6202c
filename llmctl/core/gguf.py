"""Reading GGUF files of unknown origin: header checked and bounded, tensors mapped. Knows bytes; knows no model, no torch.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader is our own because that of the gguf
package loops over counts, and allocates strings, of whatever size the file claims. Its dequantisation is used.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.core.errors import InputError, MissingExtraError, NotFoundError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_STRINGS = 1 << 21
"""In all arrays together; the largest vocabularies with their merges have under a million."""
MAX_ARRAY_STRING_BYTES = 64 << 20
MAX_ARRAY_BYTES = 64 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml's number of a tensor type -> name, numbers a block, bytes a block."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in the order of numpy (slowest first), the reverse of the file's."""

    name: str
    kind: str
    """"F32", "Q4_1", ...; a key of ggml's types."""
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufFile:
    """One checked and mapped GGUF file: `metadata` (strings, numbers, lists) and `tensors` by name.

    Raises NotFoundError when it is missing and InputError for anything wrong with it, at once and in bounded memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes < 24:
                    raise InputError(f"{path}: {num_bytes} bytes are too few for a GGUF file")
                self.buffer = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)  # private: the file is never changed
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        cursor = _Cursor(self.buffer, path)
        num_tensors, num_keys = _read_head(cursor)
        self.metadata = _read_metadata(cursor, num_keys)
        self.tensors = _read_tensors(cursor, num_tensors, self.metadata)

    def forget(self, tensor: GgufTensor) -> None:
        """Give the memory of a tensor's pages back: what was read of them is not needed again, or comes from the file."""
        page = mmap.PAGESIZE
        start, end = -(-tensor.start // page) * page, (tensor.start + tensor.num_bytes) // page * page
        if hasattr(mmap, "MADV_DONTNEED") and end > start:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)

    def raw(self, tensor: GgufTensor) -> "NDArray[np.uint8]":
        """The bytes of a tensor, one row of blocks per row: (rows, bytes a row); a view of the map."""
        flat = np.frombuffer(self.buffer, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.start)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)

    def array(self, tensor: GgufTensor) -> "NDArray[Any]":
        """The numbers of a tensor in its shape: float32, or float16 as stored. F32 and F16 are views of the map.

        Raises MissingExtraError when it is quantised in a rarer way and the gguf package is not installed.
        """
        if tensor.kind in ("F32", "F16"):
            dtype = "<f4" if tensor.kind == "F32" else "<f2"
            return np.frombuffer(self.buffer, dtype=dtype, count=math.prod(tensor.shape), offset=tensor.start).reshape(tensor.shape)
        if tensor.kind == "BF16":
            half = np.frombuffer(self.buffer, dtype="<u2", count=math.prod(tensor.shape), offset=tensor.start)
            return (half.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
        if tensor.kind in _OWN:
            return _dequantise(self.raw(tensor), tensor.kind).reshape(tensor.shape)
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError as error:
            raise MissingExtraError(f"{self.path}: reading {tensor.kind} weights", extra="gguf") from error
        try:
            return np.asarray(dequantize(self.raw(tensor), GGMLQuantizationType[tensor.kind]), dtype=np.float32).reshape(tensor.shape)
        except (NotImplementedError, KeyError) as error:
            raise InputError(f"{self.path}: tensor {tensor.name!r}: weights of type {tensor.kind} cannot be read") from error


_OWN = ("Q8_0", "Q4_0", "Q4_1")
_CHUNK_BLOCKS = 1 << 13
"""One mebibyte of float32: what is worked on stays in the cache."""


@np.errstate(invalid="ignore", over="ignore")  # scales of a bad file: what is not finite is told when it is computed with
def _dequantise(raw: "NDArray[np.uint8]", kind: str) -> "NDArray[np.float32]":
    """The numbers of the commonest types, which are groups of 32 with a scale, as the gguf package computes them, bit for bit.

    It does so for 16 rows at a time, with Python between: half as fast.
    """
    num_bytes = next(block_bytes for name, _, block_bytes in BLOCKS.values() if name == kind)
    blocks = raw.reshape(-1, num_bytes)
    out = np.empty((len(blocks), 32), dtype=np.float32)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        part, into = blocks[start : start + _CHUNK_BLOCKS], out[start : start + _CHUNK_BLOCKS]
        scale = part[:, :2].copy().view("<f2").astype(np.float32)  # (n, 1)
        if kind == "Q8_0":
            np.multiply(part[:, 2:].view(np.int8), scale, out=into)
            continue
        nibbles = part[:, num_bytes - 16 :]
        into[:, :16] = nibbles & 15
        into[:, 16:] = nibbles >> 4
        if kind == "Q4_0":
            into -= 8
        into *= scale
        if kind == "Q4_1":
            into += part[:, 2:4].copy().view("<f2").astype(np.float32)
    return out


class _Cursor:
    """Reads forward through a buffer; every step is checked against its end."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer, self.path, self.offset, self.end = buffer, path, 0, len(buffer)
        self.num_strings = self.string_bytes = 0

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: not a sound GGUF file: {what} (at byte {self.offset:,})")

    def take(self, num_bytes: int) -> int:
        """Step over `num_bytes`; returns where they start."""
        if num_bytes > self.end - self.offset:
            raise self.fail(f"{num_bytes:,} bytes are claimed, {self.end - self.offset:,} are left")
        start = self.offset
        self.offset += num_bytes
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.buffer, self.take(struct.calcsize(code)))[0]

    def text(self, limit: int) -> str:
        num_bytes = self.number("<Q")
        if num_bytes > limit:
            raise self.fail(f"a string of {num_bytes:,} bytes; at most {limit:,} are read")
        start = self.take(num_bytes)
        try:
            return self.buffer[start : start + num_bytes].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a string is not UTF-8") from error

    def scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES)
        if kind not in _SCALARS:
            raise self.fail(f"values of type {kind} are not known")
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> "NDArray[Any]":
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize)
        raw = np.frombuffer(self.buffer, dtype="u1" if kind == 7 else dtype, count=count, offset=start)
        return raw != 0 if kind == 7 else raw.copy()

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise self.fail(f"arrays of type {kind} are not known")
        if count * np.dtype(_SCALARS[kind]).itemsize > MAX_ARRAY_BYTES:
            raise self.fail(f"an array of {count:,} numbers is too long")
        result: list[Any] = self.numbers(kind, count).tolist()
        return result

    def strings(self, count: int) -> list[str]:
        self.num_strings += count
        if self.num_strings > MAX_STRINGS or count > (self.end - self.offset) // 8:
            raise self.fail(f"an array of {count:,} strings is too long")
        buffer, offset, end = self.buffer, self.offset, self.end
        length_at = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):  # the one loop that counts for speed: no calls of our own in it
                (num_bytes,) = length_at(buffer, offset)
                start = offset + 8
                offset = start + num_bytes
                if offset > end:
                    raise self.fail(f"a string of {num_bytes:,} bytes runs over the end")
                result.append(buffer[start:offset].decode("utf-8"))
                self.string_bytes += num_bytes
                if self.string_bytes > MAX_ARRAY_STRING_BYTES:
                    raise self.fail("the strings of the arrays are too long")
        except (UnicodeDecodeError, struct.error) as error:
            raise self.fail("a string of an array is not UTF-8 or cut off") from error
        self.offset = offset
        return result


def _read_head(cursor: _Cursor) -> tuple[int, int]:
    if cursor.buffer[:4] != b"GGUF":
        raise InputError(f"{cursor.path}: not a GGUF file (it does not begin with GGUF)")
    cursor.take(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        reason = "big-endian files are not read" if version in (2 << 24, 3 << 24) else "2 and 3 are read"
        raise InputError(f"{cursor.path}: GGUF version {version}; {reason}")
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise cursor.fail(f"{num_tensors:,} tensors and {num_keys:,} keys; at most {MAX_TENSORS:,} and {MAX_KEYS:,} are read")
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text(MAX_NAME_BYTES)
        kind = cursor.number("<I")
        value = cursor.array() if kind == _ARRAY else cursor.scalar(kind)
        if key in metadata:
            raise cursor.fail(f"the key {key!r} appears twice")
        metadata[key] = value
    return metadata


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}")
    heads = [_read_tensor_head(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset, num_bytes in heads:
        if name in tensors:
            raise cursor.fail(f"the tensor {name!r} appears twice")
        if offset % alignment or data_start + offset + num_bytes > cursor.end:
            raise cursor.fail(f"tensor {name!r}: its {num_bytes:,} bytes at {offset:,} are not in the file, or not aligned to {alignment}")
        tensors[name] = GgufTensor(name, kind, shape, data_start + offset, num_bytes)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise cursor.fail(f"tensor {tensor.name!r} overlaps the one before")
        end = tensor.start + tensor.num_bytes
    return tensors


def _read_tensor_head(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.text(MAX_NAME_BYTES)
    num_dimensions = cursor.number("<I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are read")
    dimensions = [cursor.number("<Q") for _ in range(num_dimensions)]
    type_number, offset = cursor.number("<I"), cursor.number("<Q")
    if type_number not in BLOCKS:
        raise cursor.fail(f"tensor {name!r} has the type {type_number}, which is not known")
    kind, block, block_bytes = BLOCKS[type_number]
    if not all(1 <= n < 1 << 40 for n in dimensions) or dimensions[0] % block:
        raise cursor.fail(f"tensor {name!r} of type {kind} cannot have the dimensions {dimensions}")
    return name, kind, tuple(reversed(dimensions)), offset, math.prod(dimensions) // block * block_bytes
