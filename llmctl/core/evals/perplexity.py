"""Perplexity and bits per byte of text. Knows windows, a model and a tokenizer; knows no file format.

For documents of tokens x_0 .. x_{n-1}, with BOS as x_0 where the definition says so, the score is the sum of
-ln p(x_i | the tokens before it in its window) over i = 1 .. n-1. perplexity = exp(sum / scored tokens);
bits_per_byte = sum / ln 2 / UTF-8 bytes of the scored tokens, which numbers of different tokenizers can be compared by.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmctl.core.distributed.ranks import Ranks
from llmctl.core.errors import InputError
from llmctl.core.evals.events import Progressed, TextScored
from llmctl.core.evals.metrics import TEXT_METRICS, Metric, exp_or_inf
from llmctl.core.evals.progress import Progress
from llmctl.core.evals.scoring import score_sequences
from llmctl.core.evals.together import scored
from llmctl.core.evals.tokens import BatchLimit, Window, windows
from llmctl.core.model import Decoder

_READ_AHEAD_WINDOWS = 256
"""So many are sorted by length together, so that little is padded and memory stays bounded."""


class Tokens(Protocol):
    """Ids in order: a list, or something that reads them when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Iterable[int]: ...


@dataclass(frozen=True)
class Document:
    """Tokens to score, the first of which is context only, and the UTF-8 bytes that the others stand for."""

    name: str
    ids: Tokens
    num_bytes: int


@dataclass(frozen=True)
class Definition:
    """How text is cut and what stands before it."""

    context_size: int
    stride: int
    bos: str | None
    """The token put before each document, as text; None for nothing."""
    whole_stream: bool = False
    """The text is one stream of packed documents, end-of-text marks included, rather than documents one by one."""

    def __str__(self) -> str:
        if self.whole_stream:
            start = "one stream of packed documents, end-of-text marks scored too; the first token is not scored"
        elif self.bos is None:
            start = "no BOS: the first token of a document is not scored, nor is an end-of-text"
        else:
            start = f"BOS {self.bos} before each document; no end-of-text is scored"
        formulas = "perplexity = exp(nll / tokens), bits per byte = nll / ln 2 / bytes"
        return f"{formulas}; context {self.context_size}, stride {self.stride}; {start}"


@dataclass(frozen=True)
class _Sums:
    """Counts over documents and windows."""

    num_documents: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    num_bytes: int = 0
    num_windows: int = 0
    num_reused: int = 0

    def __add__(self, other: "_Sums") -> "_Sums":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Sums(*(a + b for a, b in pairs))


def score_text(
    model: Decoder,
    documents: Iterable[Document],
    *,
    name: str,
    definition: Definition,
    limit: BatchLimit,
    progress: Progress,
    stop: Callable[[], None],
    ranks: Ranks | None = None,
) -> Iterator[Progressed | TextScored]:
    """Score `documents` and end with their TextScored. `stop` is called between batches and may raise.

    Raises InputError when there is nothing to score, NonFiniteError for broken weights.
    """
    sums = _Sums()
    nlls: list[float] = []
    for piece, values in _pieces(model, documents, definition, limit, progress, stop, ranks or Ranks()):
        sums += piece
        nlls += values
        yield Progressed(name=name, num_done=sums.num_windows, num_total=None)
    if not sums.num_scored or not sums.num_bytes:
        raise InputError(f"{name}: nothing to score; a document needs at least {1 if definition.bos else 2} tokens")
    yield _result(name, sums, math.fsum(nlls), definition)


def combine(name: str, results: Sequence[TextScored], definition: Definition) -> TextScored:
    """The result over several texts, as if they had been one list of documents."""
    sums = _Sums()
    for result in results:
        sums += _Sums(
            result.num_documents,
            result.num_tokens,
            result.num_scored_tokens,
            result.num_scored_bytes,
            result.num_windows,
            result.num_reused,
        )
    return _result(name, sums, math.fsum(result.nll_nats for result in results), definition)


def _result(name: str, sums: _Sums, nll: float, definition: Definition) -> TextScored:
    mean = nll / sums.num_scored
    values = (exp_or_inf(mean), nll / math.log(2) / sums.num_bytes, mean)
    metrics = tuple(Metric(key, value, None, higher_is_better=False) for key, value in zip(TEXT_METRICS, values, strict=True))
    return TextScored(
        name=name,
        metrics=metrics,
        definition=str(definition),
        num_documents=sums.num_documents,
        num_tokens=sums.num_tokens,
        num_scored_tokens=sums.num_scored,
        num_scored_bytes=sums.num_bytes,
        nll_nats=nll,
        context_size=definition.context_size,
        stride=definition.stride,
        bos=definition.bos,
        num_windows=sums.num_windows,
        num_computed=sums.num_windows - sums.num_reused,
        num_reused=sums.num_reused,
    )


@dataclass(frozen=True)
class _Job:
    """One window, its ids, and the name under which its score is kept."""

    ids: tuple[int, ...]
    num_scored: int
    unit: str


def _pieces(
    model: Decoder,
    documents: Iterable[Document],
    definition: Definition,
    limit: BatchLimit,
    progress: Progress,
    stop: Callable[[], None],
    ranks: Ranks,
) -> Iterator[tuple[_Sums, list[float]]]:
    """Counts and windows' negative log-likelihoods, a document or a batch at a time."""
    waiting: list[_Job] = []
    for number, document in enumerate(documents):
        length = len(document.ids)
        yield _Sums(num_documents=1, num_tokens=length, num_scored=max(length - 1, 0), num_bytes=document.num_bytes), []
        for window in windows(length, context_size=definition.context_size, stride=definition.stride):
            waiting.append(_job(document, number, window))
            if len(waiting) == _READ_AHEAD_WINDOWS:
                yield from _batches(model, waiting, limit, progress, stop, ranks)
                waiting = []
    yield from _batches(model, waiting, limit, progress, stop, ranks)


def _job(document: Document, number: int, window: Window) -> _Job:
    ids = tuple(int(token) for token in document.ids[window.start : window.end])
    digest = hashlib.sha256(np.array(ids, dtype="<u4").tobytes()).hexdigest()[:16]
    return _Job(ids, window.num_scored, f"{document.name}:{number}:{window.start}-{window.end}:{digest}")


def _batches(
    model: Decoder, jobs: Sequence[_Job], limit: BatchLimit, progress: Progress, stop: Callable[[], None], ranks: Ranks
) -> Iterator[tuple[_Sums, list[float]]]:
    # The batches depend on the text alone, not on what is already done: a resumed run computes in the same shapes.
    ordered = sorted(jobs, key=lambda job: -len(job.ids))
    batches = limit.cut(ordered, longest=lambda job: len(job.ids) - 1, num_sequences=lambda _: 1)

    def is_known(batch: Sequence[_Job]) -> bool:
        return all(len(progress.get(job.unit) or ()) == 1 for job in batch)

    def score(batch: Sequence[_Job]) -> list[tuple[str, list[float]]]:
        scores = score_sequences(model, [job.ids for job in batch], [job.num_scored for job in batch])
        return [(job.unit, [-score.log_likelihood]) for job, score in zip(batch, scores, strict=True)]

    for batch, reused in scored(batches, is_known=is_known, score=score, progress=progress, stop=stop, ranks=ranks):
        values = [(progress.get(job.unit) or [math.nan])[0] for job in batch]
        yield _Sums(num_windows=len(batch), num_reused=len(batch) if reused else 0), values
