"""Learns BPE merges fast, and proves them equal on a sample. Knows texts and merges; knows no files.

gigatoken counts words as GPT-2 cuts them, some thirty times as fast as `tokenizers`, and the native library joins pairs in
the order of `tokenizers` (native/bpe.cpp; gigatoken's own training spends most of its time on ties). gigatoken knows no
other pre-tokenisation: what it does not take, `tokenizers` does. It prints while it works, hence a process for it.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.tokenizer.byte_level import byte_to_char
from llmctl.core.tokenizer.fast import FastRefusedError

Merges = list[tuple[str, str]]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_LIBRARY = Path(__file__).parents[1] / "native" / "_native.so"
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from llmctl.core.tokenizer.train_fast import worker_main; worker_main()"
_SMALLEST_BYTES = 1 << 20
"""Below this `tokenizers` is done before a process has started."""
_PROOF_CHARS, _PROOF_VOCAB = 1 << 18, 1024
_WAIT_S = 0.1
_SEPARATOR = b"\0\0llmctl\0\0"


def fast_merges(texts: Sequence[str], vocab_size: int, *, min_frequency: int, reference: Callable[[Sequence[str], int], Merges]) -> Merges:
    """The merges of a byte-complete BPE with GPT-2's pre-tokenisation of `vocab_size` ids, learnt from `texts`.

    `reference` learns them by `tokenizers`; it is asked for a small sample, and what both give for it must be equal.
    Raises FastRefusedError where it is not, and where gigatoken or the native library cannot be used.
    """
    if sum(map(len, texts)) < _SMALLEST_BYTES:
        raise FastRefusedError("the text is small")
    sample = _first(texts, _PROOF_CHARS)
    if _learn(_count_words(sample), _PROOF_VOCAB, min_frequency) != reference(sample, _PROOF_VOCAB):
        raise FastRefusedError("its merges of a sample differ from those of tokenizers")
    merges = _learn(_count_words(texts), vocab_size, min_frequency)
    if len(set(merges)) < len(merges):
        raise FastRefusedError("two ways of joining make the same token")
    return merges


def vocab_of(merges: Merges) -> dict[str, int]:
    """Token -> id: the 256 bytes in the order of their characters, then what the merges make. Two of them may make the same."""
    vocab = {char: number for number, char in enumerate(sorted(byte_to_char()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    return vocab


def _first(texts: Sequence[str], num_chars: int) -> list[str]:
    chosen = []
    for text in texts:
        if num_chars <= 0:
            break
        chosen.append(text[:num_chars])
        num_chars -= len(text)
    return chosen


class _Words:
    """Counted words: `text` (all bytes,) uint8, `offsets` (words + 1,) and `counts` (words,) int64."""

    def __init__(self, text: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        self.text = text
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        self.counts = np.ascontiguousarray(counts)


def _count_words(texts: Sequence[str]) -> _Words:
    """Ask gigatoken, in its own process."""
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        raise FastRefusedError("it is not installed (pip install 'llmctl[fast]')") from error
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        separator = _SEPARATOR
        while any(separator.decode() in text for text in texts):
            separator += b"\0"
        source.write(len(separator).to_bytes(8, "little") + separator)
        for text in texts:
            source.write(text.encode() + separator)
        source.seek(0)
        _run(source, sink)
        sink.seek(0)
        data = np.frombuffer(sink.read(), dtype=np.uint8)
    num_words = int(data[:8].view(np.int64)[0])
    numbers = data[8 : 8 + 16 * num_words].view(np.int64)
    return _Words(data[8 + 16 * num_words :], numbers[:num_words], numbers[num_words:])


def _run(source: IO[bytes], sink: IO[bytes]) -> None:
    command = [sys.executable, "-P", "-c", _PROGRAM, _PACKAGE_ROOT]
    process = subprocess.Popen(command, stdin=source, stdout=sink, stderr=subprocess.DEVNULL, process_group=0)
    try:
        while True:
            try:
                code = process.wait(_WAIT_S)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.wait()
    if code:
        raise FastRefusedError(f"its process ended with status {code}")


def worker_main() -> None:
    """The process: text on descriptor 0, and on descriptor 1 the number of words, their lengths, their counts, and the words."""
    from gigatoken.gigatoken_rs import pretokenized_counts

    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    data = os.fdopen(0, "rb").read()
    separator_bytes = int.from_bytes(data[:8], "little")
    found = sorted(pretokenized_counts(data[8 + separator_bytes :], data[8 : 8 + separator_bytes]))
    sink.write(np.array([len(found)], dtype=np.int64).tobytes())
    sink.write(np.array([len(word) for word, _ in found], dtype=np.int64).tobytes())
    sink.write(np.array([count for _, count in found], dtype=np.int64).tobytes())
    sink.write(b"".join(word for word, _ in found))
    sink.flush()


def _learn(words: _Words, vocab_size: int, min_frequency: int) -> Merges:
    """Join pairs until there are `vocab_size` ids, in a thread, so that a signal is seen at once."""
    chars = sorted(byte_to_char())
    ids = {char: number for number, char in enumerate(chars)}
    table = np.array([ids[char] for char in byte_to_char()], dtype=np.uint32)
    symbols, stop = table[words.text], ctypes.c_int32(0)
    merges = np.empty((2 * vocab_size, 2), dtype=np.uint32)  # more than one may make the same token
    learn = _library()
    result: list[int] = []

    def work() -> None:
        arrays = (symbols, words.offsets, words.counts)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        out = merges.ctypes.data_as(ctypes.c_void_p)
        result.append(learn(*pointers, len(words.counts), vocab_size, min_frequency, out, len(merges), ctypes.byref(stop)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_WAIT_S)
    finally:
        stop.value = 1
        thread.join()
    if result[0] < 0:
        raise FastRefusedError("out of memory")
    tokens = list(chars)
    known = set(tokens)
    named: Merges = []
    for left, right in merges[: result[0]].tolist():
        named.append((tokens[left], tokens[right]))
        joined = tokens[left] + tokens[right]
        if joined not in known:
            known.add(joined)
            tokens.append(joined)
    return named


def _library() -> Any:
    """`llmctl_bpe_learn` of the native library; a part of it that needs nothing of its executor."""
    try:
        learn = ctypes.CDLL(str(_LIBRARY)).llmctl_bpe_learn
    except (OSError, AttributeError) as error:
        raise FastRefusedError("the native library was not built with this package") from error
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    learn.restype = number
    learn.argtypes = [pointer, pointer, pointer, number, ctypes.c_uint32, number, pointer, number, pointer]
    return learn
