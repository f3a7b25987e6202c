"""Which implementation encodes a corpus: gigatoken where it is proven equal, else `tokenizers`. Knows texts and ids; knows no files."""

import itertools
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmctl.core.data.cuts import last_cut, may_cut
from llmctl.core.errors import LlmctlError
from llmctl.core.tokenizer.fast import FastEncoder, FastRefusedError, Lengths, TokenIds, open_fast, rewrites_text

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

FAST, REFERENCE = "gigatoken", "tokenizers"

_CUT_BYTES = 1 << 20
"""`tokenizers` takes some 40 bytes of memory a byte of text, so that longer texts are cut for it."""
_FIRST_SAMPLE_BYTES = 1 << 16
_SAMPLE_PART = 1024
"""Of so many bytes one is encoded by both: `tokenizers` does some 2 MB/s in one thread, so this costs half a millisecond a megabyte;
four times as many were a sixth of all that a worker did."""
_EXCERPT_BYTES = 8192
_FEW_NAMES = 8


class UnequalError(LlmctlError):
    """On a text of the corpus gigatoken gave other ids than `tokenizers`: what it made has to be made again."""


class TextEncoder(Protocol):
    """Texts to ids, the same ones for any implementation."""

    name: str
    why: str | None
    """Why it is not gigatoken, where that was wished for."""
    num_checked_bytes: int
    """Text encoded by both implementations and found equal."""

    def encode(self, texts: Sequence[bytes], *, named: Sequence[int]) -> tuple[TokenIds, Lengths]:
        """The ids of UTF-8 texts one after another, and how many each has. `named` are the texts in which names of
        special tokens stand."""
        ...


def open_encoder(tokenizer: "Tokenizer", *, allow_special: bool, wants_fast: bool) -> TextEncoder:
    """gigatoken if it is wished for and proven equal on odd texts, else `tokenizers`, which says why."""
    reference = ReferenceEncoder(tokenizer, allow_special=allow_special)
    if not wants_fast:
        return reference
    try:
        if allow_special and rewrites_text(tokenizer):
            raise FastRefusedError("special tokens are allowed, and this tokenizer looks for them in a text that it has rewritten")
        return CheckedEncoder(open_fast(tokenizer), reference)
    except FastRefusedError as error:
        reference.why = str(error)
        return reference


class ReferenceEncoder:
    """`tokenizers`."""

    name = REFERENCE

    def __init__(self, tokenizer: "Tokenizer", *, allow_special: bool) -> None:
        self.why: str | None = None
        self.num_checked_bytes = 0
        self.treats_names = allow_special or tokenizer.reaches_control
        """Whether a text in which a special token's name stands has other ids than its characters alone would have."""
        self._tokenizer = tokenizer
        self._allow_special = allow_special
        self._may_cut = may_cut(tokenizer.structure)

    def encode(self, texts: Sequence[bytes], *, named: Sequence[int] = ()) -> tuple[TokenIds, Lengths]:
        """See TextEncoder."""
        parts = [self._parts(text) for text in texts]
        rows = self._tokenizer.encode_batch([part for text in parts for part in text], allow_special=self._allow_special, add_bos=False)
        counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=int(counts.sum()))
        if len(rows) == len(texts):
            return ids, counts
        starts = np.cumsum([0, *map(len, parts)])
        totals = np.concatenate([[0], np.cumsum(counts)])
        return ids, np.diff(totals[starts])

    def _parts(self, text: bytes) -> list[str]:
        parts = []
        while self._may_cut and len(text) > _CUT_BYTES and (cut := last_cut(text, _CUT_BYTES)):
            parts.append(text[:cut].decode())
            text = text[cut:]
        return [*parts, text.decode()]


class CheckedEncoder:
    """gigatoken, compared with `tokenizers` on a sample of what it encodes; in any number of threads. Raises UnequalError
    where they differ."""

    name = FAST

    def __init__(self, fast: FastEncoder, reference: ReferenceEncoder) -> None:
        self.why: str | None = None
        self.num_checked_bytes = 0
        self._fast = fast
        self._reference = reference
        self._credit_bytes = _FIRST_SAMPLE_BYTES
        self._num_calls = 0
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[bytes], *, named: Sequence[int]) -> tuple[TokenIds, Lengths]:
        """See TextEncoder."""
        if not texts:
            return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        ids, lengths = self._fast.encode(texts)
        self._check(texts, ids, lengths, frozenset(named))
        if named and self._reference.treats_names:
            rows = np.split(ids, np.cumsum(lengths)[:-1])
            for place in named:
                rows[place] = self._reference.encode([texts[place]])[0]
            return np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return ids, lengths

    def _check(self, texts: Sequence[bytes], ids: TokenIds, lengths: Lengths, named: frozenset[int]) -> None:
        """Compare some of `texts`: all along the corpus, more of its beginning."""
        with self._lock:
            sample = self._sample(texts, ids, lengths, named)
        if not sample:
            return
        wanted, counts = self._reference.encode([text for text, _ in sample])
        for (text, row), want in zip(sample, np.split(wanted, np.cumsum(counts)[:-1]), strict=True):
            if not np.array_equal(row, want):
                raise UnequalError(f"gigatoken's ids differ from those of tokenizers on {text[:60].decode(errors='ignore')!r}")
        with self._lock:
            self.num_checked_bytes += sum(len(text) for text, _ in sample)

    def _sample(self, texts: Sequence[bytes], ids: TokenIds, lengths: Lengths, named: frozenset[int]) -> list[tuple[bytes, TokenIds]]:
        """Texts to compare, as far as the credit goes, and gigatoken's ids of them."""
        self._credit_bytes += sum(map(len, texts)) // _SAMPLE_PART
        self._num_calls += 1
        stops = np.cumsum(lengths)
        place = self._num_calls * 2654435761  # Knuth's multiplier: another place each time
        sample: list[tuple[bytes, TokenIds]] = []
        for number in range(len(texts)):
            index = (place + number) % len(texts)
            text, row = texts[index], ids[stops[index] - lengths[index] : stops[index]]
            if len(text) > 2 * _EXCERPT_BYTES:
                text = _excerpt(text, place)
                row = self._fast.encode([text])[0]
            if len(text) > self._credit_bytes:
                break
            if not (index in named and self._reference.treats_names):
                self._credit_bytes -= len(text)
                sample.append((text, row))
        return sample


def _excerpt(text: bytes, place: int) -> bytes:
    """Some kibibytes of `text`, whole characters."""
    start = place % (len(text) - _EXCERPT_BYTES)
    return text[start : start + _EXCERPT_BYTES].decode(errors="ignore").encode()


class NameFinder:
    """Finds the names of special tokens in UTF-8 texts, at the speed of `in` where there is none."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        names = sorted((name.encode() for name in tokenizer.special_tokens), key=len, reverse=True)
        start = names[0] if names else b""
        for name in names:
            while not name.startswith(start):
                start = start[:-1]
        self._hints = names if len(names) <= _FEW_NAMES else [start] if len(start) > 1 else None
        self._pattern = re.compile(b"|".join(map(re.escape, names)) or rb"(?!)")

    def count(self, texts: Sequence[bytes]) -> tuple[int, list[int]]:
        """How many names stand in `texts`, and in which of them."""
        joined = texts[0] if len(texts) == 1 else b"\0".join(texts)  # no name begins or ends with NUL
        if self._hints is not None and not any(hint in joined for hint in self._hints):
            return 0, []
        if not self._pattern.search(joined):
            return 0, []
        found = [len(self._pattern.findall(text)) for text in texts]
        return sum(found), [place for place, number in enumerate(found) if number]
