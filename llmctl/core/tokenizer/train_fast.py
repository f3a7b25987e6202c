"""Learns BPE merges by gigatoken, in a process of its own, and proves them equal on a sample. Knows texts and merges; knows no files.

gigatoken counts words as GPT-2 cuts them, and breaks ties as `tokenizers` does, so that its merges are the same. It knows
no other pre-tokenisation, and no least frequency: what it does not take, `tokenizers` does. It prints while it works, hence
the process, which also ends at once on a signal.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmctl.core.tokenizer.byte_level import byte_to_char
from llmctl.core.tokenizer.fast import FastEncoder, FastRefusedError

Merges = list[tuple[str, str]]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from llmctl.core.tokenizer.train_fast import worker_main; worker_main()"
_SMALLEST_BYTES = 1 << 20
"""Below this `tokenizers` is done before a process has started."""
_PROOF_BYTES, _PROOF_VOCAB = 1 << 18, 1024
_WAIT_S = 0.1
_SEPARATOR = b"\0\0llmctl\0\0"


def fast_merges(texts: Sequence[str], vocab_size: int, *, min_frequency: int, reference: Callable[[Sequence[str], int], Merges]) -> Merges:
    """The merges of a byte-complete BPE with GPT-2's pre-tokenisation of `vocab_size` ids, learnt from `texts`.

    `reference` learns them by `tokenizers`; it is asked for a small sample, and what both give for it must be equal.
    Raises FastRefusedError where it is not, and where gigatoken cannot be used.
    """
    if sum(map(len, texts)) < _SMALLEST_BYTES:
        raise FastRefusedError("the text is small")
    sample = [text[:_PROOF_BYTES] for text in _first(texts, _PROOF_BYTES)]
    if _learn(sample, _PROOF_VOCAB) != reference(sample, _PROOF_VOCAB):
        raise FastRefusedError("its merges of a sample differ from those of tokenizers")
    merges = _learn(texts, vocab_size)
    vocab = vocab_of(merges)
    if len(vocab) != vocab_size or _count_last(texts, vocab, merges) < min_frequency:
        raise FastRefusedError("the text has too few words for so large a vocabulary")
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
        chosen.append(text)
        num_chars -= len(text)
    return chosen


def _count_last(texts: Sequence[str], vocab: dict[str, int], merges: Merges) -> int:
    """How often the last merge happens: counts never rise from a merge to the next, so it is the rarest of them."""
    parts: dict[str, Any] = {"normalizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    encoder = FastEncoder(json.dumps({**parts, "pre_tokenizer": pre, "model": model}))
    return sum(int(np.count_nonzero(encoder.encode([text.encode()])[0] == len(vocab) - 1)) for text in texts)


def _learn(texts: Sequence[str], vocab_size: int) -> Merges:
    """Ask gigatoken, in its own process."""
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        raise FastRefusedError("it is not installed (pip install 'llmctl[fast]')") from error
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        separator = _SEPARATOR
        while any(separator.decode() in text for text in texts):
            separator += b"\0"
        source.write(len(separator).to_bytes(8) + vocab_size.to_bytes(8) + separator)
        for text in texts:
            source.write(text.encode() + separator)
        source.seek(0)
        _run(source, sink)
        sink.seek(0)
        char = byte_to_char()
        return [
            ("".join(char[byte] for byte in bytes.fromhex(a)), "".join(char[byte] for byte in bytes.fromhex(b))) for a, b in json.load(sink)
        ]


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
    """The process: text on descriptor 0, merges as JSON on descriptor 1, and nothing else there."""
    from gigatoken.gigatoken_rs import train_bpe

    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    data = os.fdopen(0, "rb").read()
    separator_bytes, vocab_size = int.from_bytes(data[:8]), int.from_bytes(data[8:16])
    separator, text = data[16 : 16 + separator_bytes], data[16 + separator_bytes :]
    _, merges = train_bpe(text, vocab_size, [], "huggingface", separator)
    json.dump([(left.hex(), right.hex()) for left, right in merges], sink)
    sink.flush()
