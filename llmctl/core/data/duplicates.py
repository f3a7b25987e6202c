"""Which documents came before, by their keys. Knows hashes; knows no text.

A table of 64-bit keys with open addressing: 11 to 22 bytes a key, and above MEMORY_BYTES in a file of the output folder that
has no name, so that memory stays flat. Two different documents of a billion share a key with probability 0.03.
"""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmctl.core.errors import WriteError

MEMORY_BYTES = 256 << 20
_FIRST_SLOTS = 1 << 12
_CHUNK = 1 << 20

Keys = npt.NDArray[np.uint64]


class Duplicates:
    """What was seen so far, in memory or in a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: Keys = np.zeros(_FIRST_SLOTS, dtype=np.uint64)
        self._num_keys = 0

    def fresh(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(documents,): which of the documents are the first of their kind; those are remembered.

        keys: (documents, K). Two documents are of a kind when one key is equal, in its place. Raises WriteError.
        """
        places = np.arange(keys.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys = np.maximum(keys ^ places, np.uint64(1))  # 0 is an empty slot
        result: npt.NDArray[np.bool_] = np.logical_not(self._holds(keys.ravel()).reshape(keys.shape).any(axis=1))
        seen: set[int] = set()
        for document in np.flatnonzero(result):  # and now those of this call among themselves
            row = keys[document].tolist()
            if seen.isdisjoint(row):
                seen.update(row)
            else:
                result[document] = False
        self._add(np.fromiter(seen, dtype=np.uint64, count=len(seen)))
        return result

    def _slots(self, keys: Keys) -> npt.NDArray[np.int64]:
        mixed = (keys ^ (keys >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return (mixed >> np.uint64(64 - (len(self._table).bit_length() - 1))).astype(np.int64)

    def _holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        result = np.zeros(len(keys), dtype=bool)
        waiting, slots = np.arange(len(keys)), self._slots(keys)
        while len(waiting):
            found = self._table[slots]
            equal = found == keys[waiting]
            result[waiting[equal]] = True
            goes_on = ~equal & (found != 0)
            waiting, slots = waiting[goes_on], (slots[goes_on] + 1) % len(self._table)
        return result

    def _add(self, keys: Keys) -> None:
        """Put different keys in that are not there."""
        self._num_keys += len(keys)
        if self._num_keys * 4 > len(self._table) * 3:
            old, size = self._table, len(self._table)
            while self._num_keys * 4 > size * 3:
                size *= 2
            self._table = self._new_table(size)
            for start in range(0, len(old), _CHUNK):
                part = np.array(old[start : start + _CHUNK])
                self._place(part[part != 0])
        self._place(keys)

    def _place(self, keys: Keys) -> None:
        slots = self._slots(keys)
        while len(keys):
            empty = self._table[slots] == 0
            self._table[slots[empty]] = keys[empty]  # of several that want one slot, one gets it
            homeless = self._table[slots] != keys
            keys, slots = keys[homeless], (slots[homeless] + 1) % len(self._table)

    def _new_table(self, num_slots: int) -> Keys:
        if 8 * num_slots <= MEMORY_BYTES:
            return np.zeros(num_slots, dtype=np.uint64)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                zeros = bytes(_CHUNK)
                for _ in range(0, 8 * num_slots, _CHUNK):  # a hole that cannot be filled later would kill the process
                    file.write(zeros)
                file.flush()
                return np.memmap(file, dtype=np.uint64, mode="r+", shape=(num_slots,))
        except OSError as error:
            reason = "no space left" if error.errno == errno.ENOSPC else os.strerror(error.errno or 0)
            raise WriteError(f"{self._folder}: {reason} for the table of documents seen, {8 * num_slots:,} bytes (--dedupe)") from error
