"""The cache of keys and values of the native executor: slots that grow on demand. Knows arrays; knows no model's weights.

Legend: S slots, Hkv key-value heads, D head size; native.h says how a cache lies in memory.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.core.native.library import FLOAT16, FLOAT32, INT8, LANES, Layer
from llmctl.core.native.memory import aligned_zeros

CacheDtype = Literal["float32", "float16", "int8"]
CACHE_KINDS: dict[str, int] = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}
_NUMPY = {"float32": np.float32, "float16": np.uint16, "int8": np.int8}


class Cache:
    """Keys and values of every layer. int8 has a scale for each position of each head."""

    def __init__(self, *, dtype: CacheDtype, num_layers: int, num_heads: int, head_dim: int) -> None:
        self.dtype = dtype
        self.num_slots = self.capacity = 0
        self._num_layers, self._num_heads, self._head_dim = num_layers, num_heads, head_dim
        self._layers: list[dict[str, NDArray[Any]]] = []

    @property
    def num_bytes(self) -> int:
        """What it takes in memory once it is full."""
        return sum(array.nbytes for layer in self._layers for array in layer.values())

    def grow(self, *, num_slots: int, capacity: int) -> None:
        """To so many slots of so many positions, a multiple of 16; what is there stays. Raises MemoryError and leaves all as it was."""
        heads, size, kind = self._num_heads, self._head_dim, _NUMPY[self.dtype]
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "keys": ((num_slots, heads, capacity // LANES, size, LANES), kind),
            "values": ((num_slots, heads, -(-size // LANES), capacity, LANES), kind),
        }
        if self.dtype == "int8":
            shapes |= dict.fromkeys(("key_scales", "value_scales"), ((num_slots, heads, capacity), np.float32))
        layers = [{name: aligned_zeros(*shape) for name, shape in shapes.items()} for _ in range(self._num_layers)]
        for new, old in zip(layers, self._layers, strict=False):
            for name, array in new.items():
                before = _positions(name, array[: self.num_slots], self.capacity)
                before[...] = _positions(name, old[name], self.capacity)
        self._layers, self.num_slots, self.capacity = layers, num_slots, capacity

    def release(self) -> None:
        """Give the memory back."""
        self._layers, self.num_slots, self.capacity = [], 0, 0

    def copy(self, source: int, *, to: int, length: int) -> None:
        """The first `length` positions of a slot to another."""
        for layer in self._layers:
            for name, array in layer.items():
                _positions(name, array[to], length)[...] = _positions(name, array[source], length)

    def point(self, layers: Any) -> None:
        """Let the library's layers point here."""
        for layer, arrays in zip(_layers_of(layers), self._layers, strict=True):
            for name, array in arrays.items():
                setattr(layer, name, array.ctypes.data)


def _layers_of(layers: Any) -> Iterator[Layer]:
    yield from layers


def _positions(name: str, array: NDArray[Any], length: int) -> NDArray[Any]:
    """The part of a cache array (..., as `grow` shapes it) that holds the first `length` positions; of keys, whole blocks."""
    if name == "keys":
        return array[..., : -(-length // LANES), :, :]
    return array[..., :length, :] if name == "values" else array[..., :length]
