"""Perplexity and bits per byte of text. Knows windows, a model and a tokenizer; knows no file format.

For documents of tokens x_0 .. x_{n-1}, with BOS as x_0 where the definition says so, the score is the sum of
-ln p(x_i | the tokens before it in its window) over i = 1 .. n-1. perplexity = exp(sum / scored tokens);
bits_per_byte = sum / ln 2 / UTF-8 bytes of the scored tokens, which numbers of different tokenizers can be compared by.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from llmctl.core.errors import InputError
from llmctl.core.evals.events import Progressed, TextScored
from llmctl.core.evals.metrics import Metric, exp_or_inf
from llmctl.core.evals.progress import Progress
from llmctl.core.evals.scoring import score_sequences
from llmctl.core.evals.tokens import Window, windows
from llmctl.core.model import Decoder

TEXT_METRICS = ("perplexity", "bits_per_byte", "nats_per_token")
_READ_AHEAD_BATCHES = 32
"""Windows of so many batches are sorted by length together, so that little is padded and memory stays bounded."""


class Tokens(Protocol):
    """Ids in order: a list, or something that reads them when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Iterable[int]: ...


@dataclass(frozen=True)
class Document:
    """Tokens to score, the first of which is context only, and the UTF-8 bytes of the others.

    `num_bytes` None says that the bytes are those of the tokens that stand for any, and that only these tokens are charged
    for them: packed data hold end-of-text marks.
    """

    name: str
    ids: Tokens
    num_bytes: int | None


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
            start = "one stream of packed documents; the first token is not scored; bits per byte leave out tokens without bytes"
        elif self.bos is None:
            start = "no BOS: the first token of a document is not scored, nor is an end-of-text"
        else:
            start = f"BOS {self.bos} before each document; no end-of-text is scored"
        formulas = "perplexity = exp(nll / tokens), bits per byte = nll / ln 2 / bytes"
        return f"{formulas}; context {self.context_size}, stride {self.stride}; {start}"


@dataclass(frozen=True)
class _Sums:
    """Totals over windows. `byte_nll` is the part of `nll` that tokens with bytes make."""

    num_documents: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    num_bytes: int = 0
    num_windows: int = 0
    num_reused: int = 0
    nll: float = 0.0
    byte_nll: float = 0.0

    def __add__(self, other: "_Sums") -> "_Sums":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Sums(*(a + b for a, b in pairs))


def score_text(
    model: Decoder,
    documents: Iterable[Document],
    *,
    name: str,
    definition: Definition,
    batch_size: int,
    progress: Progress,
    stop: Callable[[], None],
    token_bytes: np.ndarray | None = None,
) -> Iterator[Progressed | TextScored]:
    """Score `documents` and end with their TextScored. `stop` is called between batches and may raise.

    `token_bytes` (vocabulary,) says which tokens stand for text; needed for documents without `num_bytes`. Raises
    InputError when there is nothing to score, NonFiniteError for broken weights.
    """
    sums = _Sums()
    nlls: list[tuple[float, float]] = []
    for piece, values in _pieces(model, documents, definition, batch_size, progress, stop, token_bytes):
        sums += piece
        nlls += values
        yield Progressed(name=name, num_done=sums.num_windows, num_total=None)
    if not sums.num_scored or not sums.num_bytes:
        raise InputError(f"{name}: nothing to score; a document needs at least {1 if definition.bos else 2} tokens")
    sums = replace(sums, nll=math.fsum(nll for nll, _ in nlls), byte_nll=math.fsum(nll for _, nll in nlls))
    yield _result(name, sums, definition)


def combine(name: str, results: Sequence[TextScored], definition: Definition) -> TextScored:
    """The result over several texts, as if they had been one list of documents."""
    bits = {result.name: next(metric.value for metric in result.metrics if metric.name == "bits_per_byte") for result in results}
    sums = _Sums()
    for result in results:
        byte_nll = bits[result.name] * result.num_scored_bytes * math.log(2)
        sums += _Sums(
            result.num_documents,
            result.num_tokens,
            result.num_scored_tokens,
            result.num_scored_bytes,
            result.num_windows,
            result.num_reused,
            result.nll_nats,
            byte_nll,
        )
    return _result(name, sums, definition)


def _result(name: str, sums: _Sums, definition: Definition) -> TextScored:
    mean = sums.nll / sums.num_scored
    values = (exp_or_inf(mean), sums.byte_nll / math.log(2) / sums.num_bytes, mean)
    metrics = tuple(Metric(key, value, None, higher_is_better=False) for key, value in zip(TEXT_METRICS, values, strict=True))
    return TextScored(
        name=name,
        metrics=metrics,
        definition=str(definition),
        num_documents=sums.num_documents,
        num_tokens=sums.num_tokens,
        num_scored_tokens=sums.num_scored,
        num_scored_bytes=sums.num_bytes,
        nll_nats=sums.nll,
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
    batch_size: int,
    progress: Progress,
    stop: Callable[[], None],
    token_bytes: np.ndarray | None,
) -> Iterator[tuple[_Sums, list[tuple[float, float]]]]:
    """Counts and (nll, byte nll) pairs, a stretch of documents or a batch at a time."""
    waiting: list[_Job] = []
    for number, document in enumerate(documents):
        yield _counts(document, token_bytes), []
        for window in windows(len(document.ids), context_size=definition.context_size, stride=definition.stride):
            waiting.append(_job(document, number, window))
            if len(waiting) == batch_size * _READ_AHEAD_BATCHES:
                yield from _batches(model, waiting, batch_size, progress, stop, token_bytes)
                waiting = []
    yield from _batches(model, waiting, batch_size, progress, stop, token_bytes)


def _counts(document: Document, token_bytes: np.ndarray | None) -> _Sums:
    num_bytes = document.num_bytes
    if num_bytes is None:
        assert token_bytes is not None
        num_bytes = 0
        for start in range(1, len(document.ids), 1 << 20):
            num_bytes += int(token_bytes[np.asarray(document.ids[start : start + (1 << 20)], dtype=np.int64)].sum())
    return _Sums(num_documents=1, num_tokens=len(document.ids), num_scored=max(len(document.ids) - 1, 0), num_bytes=num_bytes)


def _job(document: Document, number: int, window: Window) -> _Job:
    ids = tuple(int(token) for token in document.ids[window.start : window.end])
    digest = hashlib.sha256(np.array(ids, dtype="<u4").tobytes()).hexdigest()[:16]
    return _Job(ids, window.num_scored, f"{document.name}:{number}:{window.start}-{window.end}:{digest}")


def _batches(
    model: Decoder,
    jobs: Sequence[_Job],
    batch_size: int,
    progress: Progress,
    stop: Callable[[], None],
    token_bytes: np.ndarray | None,
) -> Iterator[tuple[_Sums, list[tuple[float, float]]]]:
    # The batches depend on the text alone, not on what is already done: a resumed run computes in the same shapes.
    ordered = sorted(jobs, key=lambda job: -len(job.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        known = [progress.get(job.unit) for job in batch]
        reused = all(values is not None and len(values) == 2 for values in known)
        if not reused:
            stop()
            known = []
            for job, scores in zip(batch, score_sequences(model, [j.ids for j in batch], [j.num_scored for j in batch]), strict=True):
                nll = -scores.log_likelihood
                if token_bytes is None:
                    known.append([nll, nll])
                else:
                    has_bytes = token_bytes[np.array(job.ids[-job.num_scored :])] > 0
                    known.append([nll, -float(scores.log_probabilities.numpy()[has_bytes].sum())])
            progress.add([(job.unit, values) for job, values in zip(batch, known, strict=True) if values is not None])
        pairs = [(values[0], values[1]) for values in known if values is not None]
        yield _Sums(num_windows=len(batch), num_reused=len(batch) if reused else 0), pairs
