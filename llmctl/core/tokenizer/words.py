"""Counts words and learns BPE merges by the native library. Knows texts, words and merges; knows no files and no special tokens.

The native library cuts text into words as the pre-tokenisers of `tokenizers` do (native/words.cpp) and joins pairs in the
order of its trainer (native/bpe.cpp), in one pass over the text and a bounded table. Both are proven equal on a sample.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmctl.core.sharedlib import Unavailable, open_library
from llmctl.core.tokenizer.byte_level import byte_to_char, token_to_bytes

Merges = list[tuple[str, str]]

PATTERNS = ("llama3", "gpt2")
"""In the order of native/words.cpp."""
LONGEST_RUN_CHARS = 64
"""A longer run without white space is cut for training: Chinese has no spaces, and `tokenizers`' trainer looks through the
whole of a word at each merge in it."""
PROOF_CHARS, _PROOF_VOCAB = 1 << 18, 1024

_MAX_TABLE_BYTES = 128 << 20
"""Some three million different words; learning takes about four times as much."""
_WAIT_S = 0.1


class NotNativeError(Exception):
    """The native library does not count or learn; the message says why."""


@dataclass(frozen=True)
class Learned:
    """`tokens` in the order of their ids, those that were there before first, and `merges` in the order of their ranks."""

    tokens: list[str]
    merges: Merges


@dataclass(frozen=True)
class Words:
    """Counted words in the order of their bytes: `text` (all bytes,) uint8, `offsets` (words + 1,) and `counts` (words,) int64.

    The rarest were left out where the table was full: `num_dropped` times a word was seen and forgotten, and no count is
    too low by more than `most_missed`.
    """

    text: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    num_dropped: int = 0
    most_missed: int = 0

    def word(self, index: int) -> bytes:
        """One of them."""
        return self.text[self.offsets[index] : self.offsets[index + 1]].tobytes()


class WordCounter:
    """Counts the words of texts, cut as `pattern` says, in a table of bounded size. Raises NotNativeError."""

    def __init__(self, pattern: str) -> None:
        self._library = _library()
        self._handle = self._library.llmctl_words_open(PATTERNS.index(pattern), LONGEST_RUN_CHARS, _MAX_TABLE_BYTES)
        if not self._handle:
            raise NotNativeError("out of memory")

    def add(self, texts: Sequence[str]) -> None:
        """Count the words of each. Raises MemoryError."""
        parts = [text.encode() for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        if self._library.llmctl_words_add(self._handle, b"".join(parts), _pointer(ends), len(parts)):
            raise MemoryError

    def take(self) -> Words:
        """The words so far. Raises MemoryError."""
        facts = np.zeros(5, dtype=np.int64)
        self._library.llmctl_words_facts(self._handle, _pointer(facts))
        num_words, num_bytes, _, num_dropped, most_missed = facts.tolist()
        text, counts = np.empty(num_bytes, dtype=np.uint8), np.empty(num_words, dtype=np.int64)
        offsets = np.empty(num_words + 1, dtype=np.int64)
        if self._library.llmctl_words_take(self._handle, _pointer(text), _pointer(offsets), _pointer(counts)):
            raise MemoryError
        return Words(text, offsets, counts, num_dropped, most_missed)

    def close(self) -> None:
        """Give the memory back."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.llmctl_words_close(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def prove(sample: Sequence[str], pattern: str, *, min_frequency: int, reference: Callable[[Sequence[str], int], Merges]) -> None:
    """Learn few tokens from `sample` natively and by `reference`, which is `tokenizers`. Raises NotNativeError where they differ."""
    counter = WordCounter(pattern)
    counter.add(sample)
    words = counter.take()
    if learn(words, _PROOF_VOCAB, min_frequency=min_frequency).merges != reference(sample, _PROOF_VOCAB):
        raise NotNativeError("its merges of a sample differ from those of tokenizers")


def learn(words: Words, vocab_size: int, *, min_frequency: int) -> Learned:
    """The tokens and merges of a byte-level BPE of `vocab_size` ids, the 256 bytes first in the order of their characters."""
    chars = sorted(byte_to_char())
    ids = {char: number for number, char in enumerate(chars)}
    table = np.array([ids[char] for char in byte_to_char()], dtype=np.uint32)
    return learn_on(table[words.text], words.offsets, words.counts, chars, vocab_size=vocab_size, min_frequency=min_frequency)


def learn_on(
    symbols: npt.NDArray[np.uint32],
    offsets: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    tokens: list[str],
    *,
    vocab_size: int,
    min_frequency: int,
    num_closed: int = 0,
) -> Learned:
    """Merges on words that are symbols already, until there are `vocab_size` tokens; in a thread, so that a signal is seen at once.

    Word i is symbols[offsets[i]:offsets[i + 1]] (overwritten), indices into `tokens`, and occurs counts[i] times. No merge
    gives one of the first `num_closed` tokens. Raises MemoryError.
    """
    native, stop = _library(), ctypes.c_int32(0)
    merges = np.empty((2 * vocab_size, 2), dtype=np.uint32)  # more than one may make the same token
    parts = [token_to_bytes(token) for token in tokens]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    result: list[int] = []

    def work() -> None:
        words = (_pointer(symbols), _pointer(offsets), _pointer(counts), len(counts))
        known = (b"".join(parts), _pointer(ends), len(parts), num_closed)
        limits = (vocab_size, min_frequency, _pointer(merges), len(merges), ctypes.byref(stop))
        result.append(native.llmctl_bpe_learn(*words, *known, *limits))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_WAIT_S)
    finally:
        stop.value = 1
        thread.join()
    if result[0] < 0:
        raise MemoryError
    named, tokens = list[tuple[str, str]](), list(tokens)
    there = set(tokens)
    for left, right in merges[: result[0]].tolist():
        named.append((tokens[left], tokens[right]))
        joined = tokens[left] + tokens[right]
        if joined not in there:
            there.add(joined)
            tokens.append(joined)
    # A pair may be joined twice, when a later merge makes one of its halves again: `tokenizers` keeps the later rank.
    return Learned(tokens, list(dict.fromkeys(reversed(named)))[::-1])


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _library() -> Any:
    """The native library; a part of it that needs nothing of its executor. Raises NotNativeError."""
    try:
        library = open_library()
        opened, learned = library.llmctl_words_open, library.llmctl_bpe_learn
    except (Unavailable, AttributeError) as error:
        raise NotNativeError(str(error)) from error
    number, pointer, short = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    opened.restype, opened.argtypes = pointer, [short, number, number]
    library.llmctl_words_add.argtypes = [pointer, ctypes.c_char_p, pointer, number]
    library.llmctl_words_facts.argtypes = [pointer, pointer]
    library.llmctl_words_take.argtypes = [pointer, pointer, pointer, pointer]
    library.llmctl_words_close.argtypes = [pointer]
    words: list[Any] = [pointer, pointer, pointer, number]
    learned.restype = number
    learned.argtypes = [*words, ctypes.c_char_p, pointer, number, number, ctypes.c_uint32, number, pointer, number, pointer]
    return library
