"""Trains a tokenizer on a corpus of any size in bounded memory. Knows texts and `tokenizers`; knows no files.

The corpus is cut into pieces; each gets a key by a hash of (seed, its number), and the pieces with the lowest keys
that fit into the budget are the sample. So the sample depends on the corpus and the seed alone.
"""

import hashlib
import heapq
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from llmctl.core.errors import InputError, UsageError
from llmctl.core.tokenizer.chatml import CHATML_TEMPLATE, CHATML_TOKENS
from llmctl.core.tokenizer.fast import FastRefusedError
from llmctl.core.tokenizer.tokenizer import Tokenizer
from llmctl.core.tokenizer.train_fast import Merges, fast_merges, vocab_of

END_OF_TEXT = "<|endoftext|>"
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""meta-llama/Meta-Llama-3-8B, tokenizer.json."""
SMALLEST_VOCAB = 256

_PIECE_CHARS = 8192
_LONGEST_RUN_CHARS = 64
"""A longer run without white space is cut for training: Chinese has no spaces, and the trainer looks through the whole
of a word at each merge in it."""
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_RUN_CHARS + 1},}}")
_HELDOUT_FRACTION = 0.02
_MAX_HELDOUT_BYTES = 4 << 20
_REPORT_BYTES = 16 << 20


@dataclass(frozen=True)
class CorpusRead:
    """Progress of reading: what was seen so far, and how much of it the sample holds. After the last one comes the training."""

    num_bytes: int
    sample_bytes: int
    is_last: bool = False


@dataclass(frozen=True)
class TokenizerTrained:
    """The result. `heldout_bytes` of text were kept from the training; `bytes_per_token` is measured on them.

    A corpus of a single piece leaves nothing to hold out: then the three numbers are of the training text, and
    `is_heldout` is false.
    """

    tokenizer: Tokenizer
    vocab_size: int
    num_bytes: int
    sample_bytes: int
    heldout_bytes: int
    heldout_tokens: int
    bytes_per_token: float
    is_heldout: bool
    trainer: str
    """"gigatoken" or "tokenizers"; the merges are the same."""
    trainer_reason: str | None
    """Why it was not gigatoken."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model: str = "bpe",
    pattern: str = "llama3",
    special_tokens: Sequence[str] = (),
    chat: bool = False,
    chat_template: str | None = None,
    sample_bytes: int = 32 << 20,
    min_frequency: int = 2,
    seed: int = 0,
) -> Iterator[CorpusRead | TokenizerTrained]:
    """Train a byte-level tokenizer on `texts`, documents or parts of them; the events end with TokenizerTrained.

    `model` is "bpe" or "word" (whole words, and bytes for all others); `pattern` is the pre-tokenisation, "llama3" or
    "gpt2". `vocab_size` counts the 256 bytes and the special tokens: `<|endoftext|>` (bos, eos and pad), with `chat`
    those of ChatML, then `special_tokens`. `sample_bytes` bounds the memory, which is 40 times as much for Chinese, less
    for text with spaces. The result does not depend on the number of threads.

    Raises UsageError for a vocabulary too small, InputError for an empty corpus.
    """
    specials = _special_tokens(special_tokens, chat=chat)
    if vocab_size < SMALLEST_VOCAB + len(specials):
        needed = SMALLEST_VOCAB + len(specials)
        raise UsageError(f"--vocab-size {vocab_size}: at least {needed} are needed, for 256 bytes and {len(specials)} special tokens")
    sample = _Sample(sample_bytes, seed=seed)
    num_reported = 0
    for text in texts:
        sample.add(text)
        if sample.num_bytes - num_reported >= _REPORT_BYTES:
            num_reported = sample.num_bytes
            yield CorpusRead(sample.num_bytes, sample.kept_bytes)
    yield CorpusRead(sample.num_bytes, sample.kept_bytes, is_last=True)
    training, heldout = sample.split()
    if not any(piece.strip() for piece in training):
        raise InputError(f"the corpus has no text to train on ({sample.num_bytes:,} bytes were read)")
    num_ordinary = vocab_size - len(specials)
    parts = [part for piece in training for part in _short_runs(piece)]
    trainer, reason = "tokenizers", None
    if model == "word":
        backend = _train_words(parts, num_ordinary, pattern, min_frequency)
    else:
        try:
            backend = _train_fast(parts, num_ordinary, pattern, min_frequency)
            trainer = "gigatoken"
        except FastRefusedError as error:
            backend, reason = _train_bpe(parts, num_ordinary, pattern, min_frequency), str(error)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    template = chat_template if chat_template is not None else (CHATML_TEMPLATE if chat else None)
    tokenizer = Tokenizer.from_parts(backend, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=END_OF_TEXT, chat_template=template)
    measured = heldout or training
    measured_bytes = sum(len(piece.encode("utf-8")) for piece in measured)
    measured_tokens = sum(map(len, tokenizer.encode_batch(measured)))
    yield TokenizerTrained(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        num_bytes=sample.num_bytes,
        sample_bytes=sample.kept_bytes,
        heldout_bytes=measured_bytes,
        heldout_tokens=measured_tokens,
        bytes_per_token=measured_bytes / measured_tokens,
        is_heldout=bool(heldout),
        trainer=trainer,
        trainer_reason=reason,
    )


def _special_tokens(given: Sequence[str], *, chat: bool) -> list[str]:
    specials = list(dict.fromkeys([END_OF_TEXT, *(CHATML_TOKENS if chat else ()), *given]))
    decoder = decoders.ByteLevel()
    for token in specials:
        if not token or token != token.strip() or len(token) < 2:
            raise UsageError(f"--special-token {token!r}: at least two characters, without white space at the ends, are wanted")
        if decoder.decode([token]) != token:  # its characters are the alphabet's names of other bytes
            raise UsageError(f"--special-token {token!r}: its characters stand for other bytes in a byte-level vocabulary; use ASCII")
    return specials


@dataclass
class _Sample:
    """The pieces with the lowest keys whose bytes fit into `budget_bytes`."""

    budget_bytes: int
    seed: int = field(kw_only=True)
    num_bytes: int = 0
    kept_bytes: int = 0
    _num_pieces: int = 0
    _ceiling: int = 1 << 64
    """The lowest key that did not fit: none above it may enter later, or the sample would depend on sizes and order."""
    _heap: list[tuple[int, int, int, str]] = field(default_factory=list)
    """(-key, number, bytes, piece): the highest key on top."""

    def add(self, text: str) -> None:
        for piece in _pieces(text):
            num_bytes = len(piece.encode("utf-8"))
            self.num_bytes += num_bytes
            number, self._num_pieces = self._num_pieces, self._num_pieces + 1
            key = _key(self.seed, "sample", number)
            if key >= self._ceiling:
                continue
            heapq.heappush(self._heap, (-key, number, num_bytes, piece))
            self.kept_bytes += num_bytes
            while self.kept_bytes > self.budget_bytes and len(self._heap) > 1:
                top, _, top_bytes, _ = heapq.heappop(self._heap)
                self.kept_bytes -= top_bytes
                self._ceiling = -top

    def split(self) -> tuple[list[str], list[str]]:
        """(training, held-out) pieces, each in the order of the corpus."""
        numbers = sorted((_key(self.seed, "heldout", number), number, num_bytes) for _, number, num_bytes, _ in self._heap)
        num_wanted = max(1, round(len(numbers) * _HELDOUT_FRACTION)) if len(numbers) > 1 else 0
        chosen: set[int] = set()
        chosen_bytes = 0
        for _, number, num_bytes in numbers[:num_wanted]:
            if not chosen or chosen_bytes + num_bytes <= _MAX_HELDOUT_BYTES:
                chosen.add(number)
                chosen_bytes += num_bytes
        pieces = sorted((number, piece) for _, number, _, piece in self._heap)
        return [p for number, p in pieces if number not in chosen], [p for number, p in pieces if number in chosen]


def _key(seed: int, purpose: str, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest())


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most _PIECE_CHARS characters, cut before a line break or a space where there is one."""
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


def _short_runs(text: str) -> Iterator[str]:
    start = 0
    for match in _LONG_RUN.finditer(text):
        for cut in range(match.start() + _LONGEST_RUN_CHARS, match.end(), _LONGEST_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _backend(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _train_bpe(texts: list[str], vocab_size: int, pattern: str, min_frequency: int) -> tokenizers.Tokenizer:
    backend = _backend(models.BPE(), pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, initial_alphabet=_alphabet(), special_tokens=[], show_progress=False
    )
    _run(backend, texts, trainer)
    return backend


def _train_fast(texts: list[str], vocab_size: int, pattern: str, min_frequency: int) -> tokenizers.Tokenizer:
    """The same as `_train_bpe`, by gigatoken. Raises FastRefusedError."""
    if pattern != "gpt2":
        raise FastRefusedError("it knows only GPT-2's pre-tokenisation (--pattern gpt2)")

    def reference(sample: Sequence[str], size: int) -> Merges:
        merges = json.loads(_train_bpe(list(sample), size, pattern, min_frequency).to_str())["model"]["merges"]
        return [(left, right) for left, right in merges]

    merges = fast_merges(texts, vocab_size, min_frequency=min_frequency, reference=reference)
    return _backend(models.BPE(vocab=vocab_of(merges), merges=merges), pattern)


def _train_words(texts: list[str], vocab_size: int, pattern: str, min_frequency: int) -> tokenizers.Tokenizer:
    """The most frequent words, and the 256 bytes for all others.

    As BPE without merges: `ignore_merges` looks a word up whole first, and what is not found stays in bytes. So the
    tokenizer loses nothing, which `tokenizers`' WordLevel with its unknown token would.
    """
    counter = _backend(models.WordLevel(unk_token=None), pattern)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[], show_progress=False)
    _run(counter, texts, trainer)
    alphabet = _alphabet()
    by_rank = sorted(counter.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in by_rank if len(word) > 1][: vocab_size - len(alphabet)]
    vocab = {token: token_id for token_id, token in enumerate([*alphabet, *words])}
    return _backend(models.BPE(vocab=vocab, merges=[], ignore_merges=True), pattern)


def _run(backend: tokenizers.Tokenizer, texts: list[str], trainer: trainers.Trainer) -> None:
    """Train in a thread, so that a signal is seen at once and not after minutes in Rust."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            backend.train_from_iterator(texts, trainer=trainer)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failure:
        raise failure[0]
