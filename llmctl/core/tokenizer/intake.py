"""What a tokenizer learns from, and what it is measured on, taken piece by piece. Knows texts; knows no model and no files.

Each piece gets keys by a hash of (seed, its number), and those with the lowest keys are taken. So who is taken depends on
the corpus and the seed alone.
"""

import hashlib
import heapq
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llmctl.core.errors import InputError
from llmctl.core.tokenizer.words import LONGEST_RUN_CHARS, NotNativeError, WordCounter, Words

HEAD_CHARS = 1 << 20
"""So much of the beginning decides who learns: with less `tokenizers`, which would learn from a good part of it for the proof anyway."""
_PIECE_CHARS = 8192
_HELDOUT_FRACTION = 0.02
_MAX_HELDOUT_BYTES = 4 << 20
_COUNT_CHARS = 1 << 18
_COUNT_PIECES = 64
_REPORT_BYTES = 16 << 20
_SAMPLE_BYTES = 32 << 20
"""What `tokenizers`' trainer gets of a corpus if nothing else is said: its memory is some 40 times as much."""
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN_CHARS + 1},}}")


@dataclass(frozen=True)
class CorpusRead:
    """Progress of reading: what was seen so far, and how much of it the sample holds. After the last one comes the training."""

    num_bytes: int
    sample_bytes: int
    is_last: bool = False


@dataclass(frozen=True)
class CorpusTaken:
    """What to learn from: `words`, or where they were not counted the `training` pieces; and the pieces to measure on."""

    words: Words | None
    training: list[str]
    measured: list[str]
    is_heldout: bool
    num_bytes: int
    sample_bytes: int
    reason: str | None = None
    """Why words were not counted, where they might have been."""


def read_corpus(
    texts: Iterable[str], *, open_counter: Callable[[Sequence[str]], WordCounter] | None, sample_bytes: int | None, seed: int
) -> Generator[CorpusRead, None, CorpusTaken]:
    """Take `texts` in; all of them, or a sample. Their words are counted by what `open_counter` gives for their beginning.

    Where it raises NotNativeError, or is None, a sample of the texts is kept instead. Raises InputError where there is no text to
    learn from.
    """
    pieces = (piece for text in texts for piece in pieces_of(text))
    head = list(_head(pieces))
    counter, reason = None, None
    if open_counter is not None:
        try:
            counter = open_counter(head)
        except NotNativeError as error:
            reason = str(error)
    if counter is not None and sample_bytes is None:
        intake: Everything | Sample = Everything(counter, seed=seed)
    else:
        intake = Sample(_SAMPLE_BYTES if sample_bytes is None else sample_bytes, seed=seed)
    num_reported = 0
    for piece in itertools.chain(head, pieces):
        intake.add(piece)
        if intake.num_bytes - num_reported >= _REPORT_BYTES:
            num_reported = intake.num_bytes
            yield CorpusRead(intake.num_bytes, intake.kept_bytes)
    yield CorpusRead(intake.num_bytes, intake.kept_bytes, is_last=True)
    training, heldout = intake.split()
    if not intake.has_text:
        raise InputError(f"the corpus has no text to train on ({intake.num_bytes:,} bytes were read)")
    words = None
    if counter is not None:
        for start in range(0, len(training), _COUNT_PIECES):
            counter.add(training[start : start + _COUNT_PIECES])
        words = counter.take()
        counter.close()
    measured = heldout or training or head
    return CorpusTaken(words, training, measured, bool(heldout), intake.num_bytes, intake.kept_bytes, reason)


def _head(pieces: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    while num_chars < HEAD_CHARS and (piece := next(pieces, None)) is not None:
        num_chars += len(piece)
        yield piece


@dataclass
class _Lowest:
    """The pieces with the lowest keys whose bytes fit into `budget_bytes`, one at least."""

    budget_bytes: int
    seed: int
    purpose: str
    kept_bytes: int = 0
    _ceiling: int = 1 << 64
    """The lowest key that did not fit: none above it may enter later, or who is kept would depend on sizes and order."""
    _heap: list[tuple[int, int, int, str]] = field(default_factory=list)
    """(-key, number, bytes, piece): the highest key on top."""

    def offer(self, number: int, num_bytes: int, piece: str) -> list[str]:
        """Keep piece `number` or not; gives the pieces that are not kept, or no longer."""
        key = _key(self.seed, self.purpose, number)
        if key >= self._ceiling:
            return [piece]
        heapq.heappush(self._heap, (-key, number, num_bytes, piece))
        self.kept_bytes += num_bytes
        return list(self.shrink(len(self._heap)))

    def shrink(self, num_pieces: int) -> Iterator[str]:
        """Give back what is above the budget, and above `num_pieces`."""
        while len(self._heap) > num_pieces or (self.kept_bytes > self.budget_bytes and len(self._heap) > 1):
            top, _, top_bytes, piece = heapq.heappop(self._heap)
            self.kept_bytes -= top_bytes
            self._ceiling = -top
            yield piece

    def pieces(self) -> list[tuple[int, int, str]]:
        """(number, bytes, piece) of those kept, in the order of the corpus."""
        return sorted((number, num_bytes, piece) for _, number, num_bytes, piece in self._heap)


def _num_heldout(num_pieces: int) -> int:
    return max(1, round(num_pieces * _HELDOUT_FRACTION)) if num_pieces > 1 else 0


class Sample:
    """A random sample of `budget_bytes`, of which 2 % of the pieces, 4 MiB at most, are held out."""

    def __init__(self, budget_bytes: int, *, seed: int) -> None:
        self.num_bytes = 0
        self.has_text = False
        """Whether the training pieces are more than white space; known after `split`."""
        self._seed, self._num_pieces = seed, 0
        self._kept = _Lowest(budget_bytes, seed, "sample")

    @property
    def kept_bytes(self) -> int:
        """Bytes of the sample."""
        return self._kept.kept_bytes

    def add(self, piece: str) -> None:
        """Take the next piece, or not."""
        num_bytes = len(piece.encode("utf-8"))
        self.num_bytes += num_bytes
        self._kept.offer(self._num_pieces, num_bytes, piece)
        self._num_pieces += 1

    def split(self) -> tuple[list[str], list[str]]:
        """(training, held-out) pieces, each in the order of the corpus."""
        pieces = self._kept.pieces()
        heldout = _Lowest(_MAX_HELDOUT_BYTES, self._seed, "heldout")
        for piece in pieces:
            heldout.offer(*piece)
        list(heldout.shrink(_num_heldout(len(pieces))))
        chosen = {number for number, _, _ in heldout.pieces()}
        training = [piece for number, _, piece in pieces if number not in chosen]
        self.has_text = any(map(str.strip, training))
        return training, [piece for _, _, piece in heldout.pieces()]


class Everything:
    """All pieces, their words counted at once, but for those that `Sample` would hold out if all the text fitted into it."""

    def __init__(self, counter: WordCounter, *, seed: int) -> None:
        self.num_bytes = 0
        self.has_text = False
        """As that of Sample."""
        self._counter, self._num_pieces = counter, 0
        self._heldout = _Lowest(_MAX_HELDOUT_BYTES, seed, "heldout")
        self._waiting: list[str] = []
        self._waiting_chars = 0

    @property
    def kept_bytes(self) -> int:
        """All bytes."""
        return self.num_bytes

    def add(self, piece: str) -> None:
        """Take the next piece."""
        num_bytes = len(piece.encode("utf-8"))
        self.num_bytes += num_bytes
        for given_back in self._heldout.offer(self._num_pieces, num_bytes, piece):
            self._count(given_back)
        self._num_pieces += 1

    def split(self) -> tuple[list[str], list[str]]:
        """(nothing, held-out pieces): what is to be learnt is in the counter."""
        for piece in self._heldout.shrink(_num_heldout(self._num_pieces)):
            self._count(piece)
        self._flush()
        return [], [piece for _, _, piece in self._heldout.pieces()]

    def _count(self, piece: str) -> None:
        self._waiting.append(piece)
        self._waiting_chars += len(piece)
        self.has_text = self.has_text or not piece.isspace()
        if self._waiting_chars >= _COUNT_CHARS:
            self._flush()

    def _flush(self) -> None:
        self._counter.add(self._waiting)
        self._waiting, self._waiting_chars = [], 0


def _key(seed: int, purpose: str, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest())


def pieces_of(text: str) -> Iterator[str]:
    """`text` in pieces of at most 8192 characters, cut before a line break or a space where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        limit = start + _PIECE_CHARS
        cut = max(text.rfind("\n", start + 1, limit), start)
        if cut == start:
            cut = max(text.rfind(" ", start + 1, limit), start)
        if cut == start:
            cut = limit
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def short_runs(text: str) -> Iterator[str]:
    """`text` cut before each LONGEST_RUN_CHARS characters without white space, as the counter does it."""
    start = 0
    for match in _LONG_RUN.finditer(text):
        for cut in range(match.start() + LONGEST_RUN_CHARS, match.end(), LONGEST_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]
