"""Batches of pieces, and encoding them in this process, in one thread or in several. Knows no corpus, no shards and no other process.

Threads where gigatoken encodes: it gives up the interpreter's lock, as hashing and decompressing do, and a thread starts at
once, where a process first imports and builds all anew (1.2 s on a Zen 1). What is Python all through (`tokenizers` as we call
it, the quality tools) goes to processes instead, see worker.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from llmctl.core.data.documents import Piece
from llmctl.core.data.encode import EncodedPiece, EncoderNote, EncodeRules, PieceEncoder
from llmctl.core.data.encoders import FAST

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

Result = TypeVar("Result")

MOST_THREADS = 4
"""More workers than this are processes: reading JSON holds the interpreter's lock for a fifth of the time."""


@dataclass(frozen=True)
class PieceBatch:
    """Pieces that one worker encodes at once; `first_piece` is the number of the first in the corpus."""

    first_piece: int
    pieces: tuple[Piece, ...]
    wants_train: bool
    wants_val: bool
    num_bytes_taken: int
    """Bytes of the input's files read when the batch was full."""


@dataclass(frozen=True)
class EncodedBatch:
    """What became of a batch, a result for each of its pieces."""

    batch: PieceBatch
    results: list[EncodedPiece]
    note: EncoderNote
    worker: int = 0


class Encoders(Protocol):
    """What turns batches into results, in the batches' order."""

    def run(self, batches: Iterator[PieceBatch]) -> Iterator[EncodedBatch]: ...

    def close(self) -> None: ...


class InlineEncoders:
    """Encodes in this process, in the thread that asks if `num_threads` is 1; with an encoder that is open already, if given."""

    def __init__(self, rules: EncodeRules, tokenizer: "Tokenizer", num_threads: int = 1, *, encoder: PieceEncoder | None = None) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._num_threads = num_threads
        self._encoder = encoder
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="llmctl-pack") if num_threads > 1 else None

    def run(self, batches: Iterator[PieceBatch]) -> Iterator[EncodedBatch]:
        """See Encoders. Raises UnequalError as PieceEncoder does."""
        encoder = self._encoder or PieceEncoder(self._rules, self._tokenizer)

        def encoded(batch: PieceBatch) -> tuple[PieceBatch, list[EncodedPiece]]:
            return batch, encoder.encode(batch.pieces, wants_train=batch.wants_train, wants_val=batch.wants_val)

        executor = self._executor
        found = in_order(batches, lambda b: executor.submit(encoded, b), most=2 * self._num_threads) if executor else map(encoded, batches)
        for batch, results in found:
            yield EncodedBatch(batch, results, encoder.note)

    def close(self) -> None:
        """Wait for what is at work, some milliseconds a thread, and drop the rest."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def open_threads(rules: EncodeRules, tokenizer: "Tokenizer", num_threads: int) -> InlineEncoders | None:
    """So many threads, if they can do what as many processes would; None if not."""
    if not rules.wants_fast or rules.quality.is_on or num_threads > MOST_THREADS:
        return None
    encoder = PieceEncoder(rules, tokenizer)
    return InlineEncoders(rules, tokenizer, num_threads, encoder=encoder) if encoder.note.name == FAST else None


def in_order(batches: Iterator[PieceBatch], submit: Callable[[PieceBatch], Future[Result]], *, most: int) -> Iterator[Result]:
    """What `submit` makes of batches, in their order, at most so many under way, so that memory does not grow with the corpus."""
    waiting: deque[Future[Result]] = deque()
    for batch in itertools.chain(batches, [None]):
        if batch is not None:
            waiting.append(submit(batch))
        while waiting and (batch is None or len(waiting) >= most or waiting[0].done()):
            yield waiting.popleft().result()
