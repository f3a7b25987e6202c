"""Keys and values of texts under way, one slot a text. Knows tensors and positions; knows no scheduling.

Legend: B rows of a call, T tokens a row, S slots, Hkv key-value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.core.config.model import ModelConfig


class KVCache:
    """Preallocated keys and values: per layer (S, Hkv, capacity, D) each, and the length of the text in each slot.

    A query sees the positions of its slot up to its own, so what lies behind `lengths[slot]` is never read before it is
    written again: to reuse a slot, call `clear`; to take back tokens (speculation, a stop string), `truncate`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_slots, config.num_kv_heads, capacity, config.head_dim)
        self.num_slots, self.capacity = num_slots, capacity
        # zeros, not empty: a masked key still enters the sum with weight 0, and 0 * NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)  # on the CPU: it steers, it does not compute

    @property
    def num_bytes(self) -> int:
        """Bytes that keys and values take."""
        return sum(t.numel() * t.element_size() for t in [*self.keys, *self.values])

    def clear(self, slots: Sequence[int] | None = None) -> None:
        """Forget the texts of `slots`, or of all."""
        self.lengths[slice(None) if slots is None else list(slots)] = 0

    def truncate(self, slot: int, *, length: int) -> None:
        """Forget all but the first `length` tokens of `slot`."""
        self.lengths[slot] = min(length, int(self.lengths[slot]))

    def copy_slot(self, source: int, *, to: int) -> None:
        """Make slot `to` hold the text of slot `source` (beam search, several samples of one prompt)."""
        length = int(self.lengths[source])
        for tensor in (*self.keys, *self.values):
            tensor[to, :, :length] = tensor[source, :, :length]
        self.lengths[to] = length

    def write(self, layer: int, place: "Place | FixedPlace", keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `keys` and `values` (B, Hkv, T, D) at `place`, and return all that its rows hold, (B, Hkv, K, D) each."""
        return place.put(self.keys[layer], keys), place.put(self.values[layer], values)


class Place:
    """Where the tokens of one call go, worked out once for all layers.

    `slots` (B,) are distinct; `positions` (B, T) are places in the slot's text, and -1 marks padding, which is not
    stored. Both lie on the CPU. K, `num_keys`, is the length of the longest text after the call. Raises ValueError when
    a position does not fit the cache.
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        if positions.numel() and int(positions.max()) >= cache.capacity:
            raise ValueError(f"position {int(positions.max())} does not fit a cache of {cache.capacity}")
        self.slots, self.positions = slots, positions
        self.num_keys = int(positions.max()) + 1
        first = int(slots[0])
        self._range = slice(first, first + len(slots)) if slots.tolist() == list(range(first, first + len(slots))) else None
        start, num_tokens = int(positions[0, 0]), positions.shape[1]
        straight = start >= 0 and torch.equal(positions, torch.arange(start, start + num_tokens).expand_as(positions))
        self._span = slice(start, start + num_tokens) if straight else None
        self.same_start = start if straight else None
        device = cache.keys[0].device
        self._slots = slots.to(device)
        if self._span is None:
            rows, columns = (positions >= 0).nonzero(as_tuple=True)
            self._rows, self._columns = rows.to(device), columns.to(device)
            self._to_slots, self._to_positions = slots[rows].to(device), positions[rows, columns].to(device)

    def put(self, store: Tensor, new: Tensor) -> Tensor:
        """Write `new` (B, Hkv, T, D) into `store` (S, Hkv, capacity, D); return the rows' first K positions."""
        new = new.to(store.dtype)
        if self._span is None:
            store[self._to_slots, :, self._to_positions] = new[self._rows, :, self._columns]
        elif self._range is not None:
            store[self._range, :, self._span] = new
        else:
            store[self._slots, :, self._span] = new
        if self._range is not None:
            return store[self._range, :, : self.num_keys]
        return store[:, :, : self.num_keys].index_select(0, self._slots)


class FixedPlace:
    """Where one token a row goes, in a call whose shapes do not depend on where: what a CUDA graph can replay for other rows.

    `slots` and `positions` (B,) lie on the device and are read when the call runs. `num_keys` keys of each row are given
    back, those behind a row's own among them, for a mask to leave out. `in_order` says that the slots are 0 to B - 1, which
    saves a copy. A row that is there twice must be the same twice. Nothing is checked.
    """

    def __init__(self, slots: Tensor, positions: Tensor, *, num_keys: int, in_order: bool) -> None:
        self._slots, self._positions, self._num_keys, self._in_order = slots, positions, num_keys, in_order

    def put(self, store: Tensor, new: Tensor) -> Tensor:
        """Write `new` (B, Hkv, 1, D) into `store` (S, Hkv, capacity, D); return the rows' first K positions, (B, Hkv, K, D)."""
        store[self._slots, :, self._positions] = new[:, :, 0].to(store.dtype)
        if self._in_order:
            return store[: len(new), :, : self._num_keys]
        return store[:, :, : self._num_keys].index_select(0, self._slots)
