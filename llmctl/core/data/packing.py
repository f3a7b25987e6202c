"""Rows of different lengths packed into sequences of one length. Knows encoded rows; knows no tokenizer and no model.

A packed sequence carries the lengths of its documents, and attention stays within each, so packing changes the cost of a
step and not its loss. Which rows share a sequence follows from the lengths and the epoch alone.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmctl.core.data.loader import IGNORE, Sample

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class EncodedRows:
    """Rows end to end. Row i is ids[ends[i-1]:ends[i]]; `learn` says of each token whether the model shall learn to write it.

    ids: (N,) int32; learn: (N,) bool; ends: (R,) int64. A row holds at least two tokens.
    """

    ids: NDArray[np.int32]
    learn: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(R,) tokens of each row."""
        return np.diff(self.ends, prepend=0)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, learn) of one row."""
        start = 0 if index == 0 else int(self.ends[index - 1])
        stop = int(self.ends[index])
        return self.ids[start:stop], self.learn[start:stop]


def pack_decreasing(sizes: Sequence[int] | NDArray[np.int64], *, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: places in `sizes`, which must fall and be 1..capacity, grouped so that no group is over capacity.

    Each item goes to the fullest bin that still has room (within 11/9 of the fewest bins + 1; Johnson 1973). The rooms
    that bins have left are a bit set in one integer, so an item costs one shift instead of a search.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when with_room[r] is not empty
    for place, size in enumerate(sizes):
        fitting = rooms >> int(size)
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + int(size)
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(place)
        left = room - int(size)
        if left:
            with_room[left].append(chosen)
            rooms |= 1 << left
    return bins


class PackedSource:
    """A SampleSource over EncodedRows: `sample_at(index)` is a pure function of (rows, seq_len, seed, index).

    The bins are packed once, from the lengths in falling order. In each epoch rows of equal length trade places and the
    bins are dealt in a new order, so every epoch holds each row once and has the same number of sequences: a step is a
    place in an epoch, without a count to store. With `shuffle` off there is one epoch, in a fixed order (evaluation).

    A row of L tokens fills L - 1 places (token -> next token). What is left at the end of a sequence is filled with
    `pad_id`, as a document of its own that nothing learns from.
    """

    def __init__(self, rows: EncodedRows, *, seq_len: int, seed: int, data_hash: str, pad_id: int = 0, shuffle: bool = True) -> None:
        self.rows = rows
        self.seq_len = seq_len
        self.seed = seed
        self.data_hash = data_hash
        self._pad_id = pad_id
        self._shuffle = shuffle
        self._sizes = rows.lengths - 1
        if len(rows) == 0 or int(self._sizes.min()) < 1 or int(self._sizes.max()) > seq_len:
            raise ValueError("rows to pack must hold 2 to seq_len + 1 tokens, and there must be one")
        falling = np.sort(self._sizes)[::-1]
        self._bins = pack_decreasing(falling, capacity=seq_len)
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._lock = threading.Lock()  # the prefetcher's thread and the evaluation may ask at once

    @property
    def samples_per_epoch(self) -> int:
        """Packed sequences in one pass over the rows."""
        return len(self._bins)

    def rows_at(self, index: int) -> list[int]:
        """The rows in packed sequence `index`, in their order there."""
        epoch, place = divmod(index, len(self._bins))
        if index < 0 or (epoch and not self._shuffle):
            raise IndexError(f"sample {index} of {len(self._bins)}")
        row_of_slot, bin_order = self._epoch(epoch)
        return [int(row_of_slot[slot]) for slot in self._bins[int(bin_order[place])]]

    def sample_at(self, index: int) -> Sample:
        """Packed sequence `index`, counted over all epochs: tokens (T,), targets (T,) and the document lengths (sum T)."""
        tokens = np.full(self.seq_len, self._pad_id, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        lengths: list[int] = []
        start = 0
        for row in self.rows_at(index):
            ids, learn = self.rows.row(row)
            size = len(ids) - 1
            tokens[start : start + size] = ids[:-1]
            targets[start : start + size] = np.where(learn[1:], ids[1:], IGNORE)
            lengths.append(size)
            start += size
        if start < self.seq_len:
            lengths.append(self.seq_len - start)
        return Sample(tokens=tokens, targets=targets, document_lengths=tuple(lengths))

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(row of each slot in falling order of length, order of the bins) of one epoch."""
        with self._lock:
            if epoch not in self._epochs:
                keys = self._keys(epoch)
                row_of_slot = np.lexsort((keys[: len(self.rows)], -self._sizes))
                bin_order = np.argsort(keys[len(self.rows) :], kind="stable") if self._shuffle else np.arange(len(self._bins))
                self._epochs[epoch] = (row_of_slot, bin_order)
                for old in list(self._epochs)[:-_EPOCHS_KEPT]:
                    del self._epochs[old]
            return self._epochs[epoch]

    def _keys(self, epoch: int) -> NDArray[np.uint64]:
        """Random sorting keys, one a row and one a bin. Philox's raw stream is fixed for ever; numpy's permutation is not."""
        count = len(self.rows) + len(self._bins)
        if not self._shuffle:
            return np.zeros(count, dtype=np.uint64)
        return np.random.Philox(key=[self.seed, epoch]).random_raw(count).astype(np.uint64, copy=False)
