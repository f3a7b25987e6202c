"""From packed ids to training batches: which ids form sample number i. Knows datasets and seeds; knows no model and no rank.

A sample is a pure function of (data, seed, global sample index), so a run resumes exactly from a number, on any number
of ranks. Legend: B rows of a batch, T = seq_len.
"""

import dataclasses
import hashlib
import queue
import threading
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmctl.core.data.shards import Ids, TokenDataset
from llmctl.core.errors import InputError

if typing.TYPE_CHECKING:
    import torch

IGNORE = -100
"""Target of a position without loss; the default `ignore_index` of torch's cross-entropy."""

_MASK64 = (1 << 64) - 1
_ROUNDS = 6
"""Four rounds already pass for a pseudo-random permutation (Luby and Rackoff, 1988); two more for small domains."""


@dataclass(frozen=True)
class Sample:
    """One row: `tokens` (T,) int64, `targets` (T,) int64 with IGNORE where no loss is taken.

    `document_lengths` sums to T and says where attention must not cross; None means that it may cross.
    """

    tokens: Ids
    targets: Ids
    document_lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of samples: `tokens` (B, T) and `targets` (B, T), int64 tensors; lengths per row, or None.

    Row r is the global sample `first_sample` + r.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    document_lengths: tuple[tuple[int, ...], ...] | None = None
    first_sample: int = 0


class SampleSource(Protocol):
    """Anything that maps a global sample index to a sample, always the same one.

    `samples_per_epoch` is None where epochs mean nothing. A finite source raises IndexError past its end.
    """

    @property
    def seq_len(self) -> int: ...

    @property
    def data_hash(self) -> str: ...

    @property
    def samples_per_epoch(self) -> int | None: ...

    def sample_at(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Permutation:
    """A bijection of range(length) chosen by `key`, in O(1) memory and time: a Feistel network with cycle walking.

    Plain integer arithmetic, so every platform and every version of numpy agrees. An array shuffled by a generator
    would take 8 bytes a sample and tie the order to that generator.
    """

    length: int
    key: bytes
    _half_bits: int = dataclasses.field(init=False, repr=False)
    _round_keys: tuple[int, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a permutation of {self.length} items")
        digest = hashlib.shake_256(b"llmctl permutation\0" + self.key).digest(8 * _ROUNDS)
        keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
        object.__setattr__(self, "_half_bits", max(1, ((self.length - 1).bit_length() + 1) // 2))
        object.__setattr__(self, "_round_keys", keys)

    def __call__(self, index: int) -> int:
        """Where `index` goes, in range(length)."""
        if not 0 <= index < self.length:
            raise IndexError(f"{index} is not in range({self.length})")
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        while True:  # the domain has at most 4 * length values, so four turns are the mean at worst
            left, right = index >> bits, index & mask
            for key in self._round_keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            index = left << bits | right
            if index < self.length:
                return index


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    value &= _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


class PretrainSource:
    """Windows of a token stream for next-token training, in another order and at another phase each epoch.

    Epoch e cuts the stream into windows of T + 1 ids with stride T (the last id of one window is the first of the
    next, so each id is predicted once), from a phase in [0, T) drawn for e; the windows are visited in an order drawn
    for e. Fewer than T ids at each end of the stream are left out of an epoch. `with_documents` attaches document lengths.

    Raises InputError when the data is shorter than one window.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int, *, with_documents: bool = False) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}")
        if dataset.num_tokens < seq_len + 1:
            raise InputError(
                f"{dataset.directory}: the {dataset.split} split has {dataset.num_tokens:,} ids, one sequence needs {seq_len + 1:,};"
                " pack more text or lower --seq-len"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.data_hash = dataset.data_hash
        self._with_documents = with_documents
        # One window is given up so that every phase leaves the same number; where only one exists, the phase is what is left over.
        num_predicted = dataset.num_tokens - 1
        self.samples_per_epoch: int = max(1, (num_predicted - (seq_len - 1)) // seq_len)
        self._num_phases = min(seq_len, num_predicted - self.samples_per_epoch * seq_len + 1)
        self._epoch: tuple[int, int, Permutation] | None = None

    def sample_at(self, index: int) -> Sample:
        """Sample number `index` from 0 on, counted over all epochs and ranks."""
        start = self.start_of(index)
        ids = self.dataset.tokens_at(start, self.seq_len + 1)
        lengths = self.dataset.document_lengths_at(start, self.seq_len) if self._with_documents else None
        return Sample(ids[:-1], ids[1:], lengths)

    def start_of(self, index: int) -> int:
        """Position in the stream of the first id of sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, place = divmod(index, self.samples_per_epoch)
        cached = self._epoch  # read once: a prefetching thread and its consumer may both be here
        if cached is None or cached[0] != epoch:
            key = f"{self.seed} {epoch}".encode()
            phase = int.from_bytes(hashlib.sha256(b"llmctl phase\0" + key).digest()[:8], "little") % self._num_phases
            cached = self._epoch = (epoch, phase, Permutation(self.samples_per_epoch, key))
        return cached[1] + cached[2](place) * self.seq_len


class EvalSource:
    """The whole stream in order, each id but the first predicted once; the last window is filled up with IGNORE.

    Raises InputError when there is nothing to predict.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}")
        if dataset.num_tokens < 2:
            raise InputError(
                f"{dataset.directory}: the {dataset.split} split has {dataset.num_tokens} ids; two are the least to evaluate on"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.data_hash = dataset.data_hash
        self.num_targets = dataset.num_tokens - 1
        self.samples_per_epoch: int = -(-self.num_targets // seq_len)

    def sample_at(self, index: int) -> Sample:
        """Window `index`: ids [index * T, index * T + T) and their successors."""
        if not 0 <= index < self.samples_per_epoch:
            raise IndexError(f"sample {index} of {self.samples_per_epoch}")
        start = index * self.seq_len
        count = min(self.seq_len, self.num_targets - start)
        ids = self.dataset.tokens_at(start, count + 1)
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE, dtype=np.int64)
        tokens[:count] = ids[:-1]
        targets[:count] = ids[1:]
        return Sample(tokens, targets)


@dataclass(frozen=True)
class _Rows:
    """A batch still in numpy: what the prefetching thread makes, since torch has no business in a second thread."""

    tokens: Ids
    targets: Ids
    document_lengths: tuple[tuple[int, ...], ...] | None
    first_sample: int

    def to_batch(self) -> Batch:
        import torch

        return Batch(torch.from_numpy(self.tokens), torch.from_numpy(self.targets), self.document_lengths, self.first_sample)


def _rows_at(source: SampleSource, first_index: int, num_rows: int) -> _Rows:
    samples = [source.sample_at(first_index + row) for row in range(num_rows)]
    lengths = tuple(s.document_lengths for s in samples if s.document_lengths is not None)
    if len(lengths) not in (0, num_rows):
        raise ValueError("some samples of a source have document lengths and some have not")
    return _Rows(np.stack([s.tokens for s in samples]), np.stack([s.targets for s in samples]), lengths or None, first_index)


def batch_at(source: SampleSource, first_index: int, num_rows: int) -> Batch:
    """Samples first_index to first_index + num_rows - 1 as one batch of (num_rows, T)."""
    return _rows_at(source, first_index, num_rows).to_batch()


class Prefetcher:
    """Batches number 0, 1, 2, ... made ahead by a thread: iterate over it, and close it (or use `with`).

    Batch k is `batch_at(source, first_index + k * stride, num_rows)`, exactly. What the source raises comes out of
    `next` in its place, so the batches before it are delivered.
    """

    def __init__(
        self, source: SampleSource, *, first_index: int, num_rows: int, stride: int | None = None, count: int | None = None, ahead: int = 2
    ) -> None:
        self._source = source
        self._first_index = first_index
        self._num_rows = num_rows
        self._stride = num_rows if stride is None else stride
        self._count = count
        self._closed = threading.Event()
        self._queue: queue.Queue[_Rows | BaseException | None] = queue.Queue(maxsize=max(1, ahead))
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llmctl-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            number = 0
            while (self._count is None or number < self._count) and not self._closed.is_set():
                self._put(_rows_at(self._source, self._first_index + number * self._stride, self._num_rows))
                number += 1
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: _Rows | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ended is not None:
            raise self._ended
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self._ended = StopIteration() if item is None else item
            raise self._ended
        return item.to_batch()

    def close(self) -> None:
        """Stop the thread and wait for it; what it had made is dropped."""
        self._closed.set()
        while True:  # a full queue would keep the thread waiting for its time-out
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    source: SampleSource, *, first_index: int, num_rows: int, stride: int | None = None, count: int | None = None, ahead: int = 2
) -> Prefetcher:
    """Batches from sample `first_index` on, made up to `ahead` batches early in a thread; see Prefetcher.

    `stride` is how far one batch lies from the next in global sample indices (default `num_rows`); a rank of several
    passes the global batch size. `count` ends the stream after so many batches; None means never.
    """
    return Prefetcher(source, first_index=first_index, num_rows=num_rows, stride=stride, count=count, ahead=ahead)
