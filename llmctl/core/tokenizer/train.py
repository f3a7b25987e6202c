"""Trains a tokenizer on a corpus of any size in bounded memory. Knows texts and `tokenizers`; knows no files.

The corpus is cut into pieces, which intake.py takes: all of them, as counts of their words, or a sample of them.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from llmctl.core.errors import UsageError
from llmctl.core.tokenizer import intake
from llmctl.core.tokenizer.chatml import CHATML_TEMPLATE, CHATML_TOKENS
from llmctl.core.tokenizer.intake import CorpusRead, CorpusTaken, read_corpus, short_runs
from llmctl.core.tokenizer.tokenizer import Tokenizer
from llmctl.core.tokenizer.words import PROOF_CHARS, Merges, NotNativeError, WordCounter, learn, prove

END_OF_TEXT = "<|endoftext|>"
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""meta-llama/Meta-Llama-3-8B, tokenizer.json."""
SMALLEST_VOCAB = 256


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
    """"native" or "tokenizers"; the merges are the same."""
    trainer_reason: str | None
    """Why it was not the native library."""
    num_dropped: int = 0
    """How often a word was seen and forgotten, because the table of words was full and it was among the rarest."""
    most_missed: int = 0
    """By how much the count of a word may be too low for that."""
    bytes_per_token_before: float | None = None
    """That of the tokenizer that was extended, on the same text."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model: str = "bpe",
    pattern: str = "llama3",
    special_tokens: Sequence[str] = (),
    chat: bool = False,
    chat_template: str | None = None,
    sample_bytes: int | None = None,
    min_frequency: int = 2,
    seed: int = 0,
) -> Iterator[CorpusRead | TokenizerTrained]:
    """Train a byte-level tokenizer on `texts`, documents or parts of them; the events end with TokenizerTrained.

    `model` is "bpe" or "word" (whole words, and bytes for all others); `pattern` is the pre-tokenisation, "llama3" or
    "gpt2". `vocab_size` counts the 256 bytes and the special tokens: `<|endoftext|>` (bos, eos and pad), with `chat`
    those of ChatML, then `special_tokens`. The words of all the text are counted by the native library, in a table of
    bounded size (see native/words.cpp); with `sample_bytes`, or where `tokenizers` has to do it, those of a random sample, 32
    MiB if nothing else is said. The result does not depend on the number of threads.

    Raises UsageError for a vocabulary too small, InputError for an empty corpus.
    """
    specials = _special_tokens(special_tokens, chat=chat)
    if vocab_size < SMALLEST_VOCAB + len(specials):
        needed = SMALLEST_VOCAB + len(specials)
        raise UsageError(f"--vocab-size {vocab_size}: at least {needed} are needed, for 256 bytes and {len(specials)} special tokens")
    open_counter = None if model == "word" else lambda head: proven_counter(head, pattern, min_frequency)
    read = yield from read_corpus(texts, open_counter=open_counter, sample_bytes=sample_bytes, seed=seed)
    num_ordinary = vocab_size - len(specials)
    if read.words is not None:
        learned = learn(read.words, num_ordinary, min_frequency=min_frequency)
        backend = _backend(models.BPE(vocab={token: i for i, token in enumerate(learned.tokens)}, merges=learned.merges), pattern)
    else:
        parts = [part for piece in read.training for part in short_runs(piece)]
        train = _train_words if model == "word" else _train_bpe
        backend = train(parts, num_ordinary, pattern, min_frequency)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    template = chat_template if chat_template is not None else (CHATML_TEMPLATE if chat else None)
    tokenizer = Tokenizer.from_parts(backend, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=END_OF_TEXT, chat_template=template)
    yield trained(tokenizer, read)


def trained(tokenizer: Tokenizer, read: CorpusTaken, *, base: Tokenizer | None = None) -> TokenizerTrained:
    """The result, measured; `base` is the tokenizer that was extended."""
    measured_bytes = sum(len(piece.encode("utf-8")) for piece in read.measured)

    def tokens_by(encoder: Tokenizer) -> int:
        return sum(map(len, encoder.encode_batch(read.measured, add_bos=False)))

    num_tokens = tokens_by(tokenizer)
    return TokenizerTrained(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        num_bytes=read.num_bytes,
        sample_bytes=read.sample_bytes,
        heldout_bytes=measured_bytes,
        heldout_tokens=num_tokens,
        bytes_per_token=measured_bytes / num_tokens,
        is_heldout=read.is_heldout,
        trainer="tokenizers" if read.words is None else "native",
        trainer_reason=read.reason,
        num_dropped=0 if read.words is None else read.words.num_dropped,
        most_missed=0 if read.words is None else read.words.most_missed,
        bytes_per_token_before=None if base is None else measured_bytes / tokens_by(base),
    )


def proven_counter(head: Sequence[str], pattern: str, min_frequency: int) -> WordCounter:
    """The native counter, proven on the beginning of the text. Raises NotNativeError."""
    if sum(map(len, head)) < intake.HEAD_CHARS:
        raise NotNativeError("the text is small")

    def reference(sample: Sequence[str], size: int) -> Merges:
        parts = [part for piece in sample for part in short_runs(piece)]
        merges = json.loads(_train_bpe(parts, size, pattern, min_frequency).to_str())["model"]["merges"]
        return [(left, right) for left, right in merges]

    sample, num_chars = list[str](), 0
    for piece in head:
        if num_chars >= PROOF_CHARS:
            break
        sample.append(piece)
        num_chars += len(piece)
    prove(sample, pattern, min_frequency=min_frequency, reference=reference)
    return WordCounter(pattern)


def _special_tokens(given: Sequence[str], *, chat: bool) -> list[str]:
    specials = list(dict.fromkeys([END_OF_TEXT, *(CHATML_TOKENS if chat else ()), *given]))
    check_special_tokens(specials)
    return specials


def check_special_tokens(tokens: Sequence[str], *, is_byte_level: bool = True) -> None:
    """Raises UsageError for a name that cannot be a special token's."""
    decoder = decoders.ByteLevel()
    for token in tokens:
        if not token or token != token.strip() or len(token) < 2:
            raise UsageError(f"--special-token {token!r}: at least two characters, without white space at the ends, are wanted")
        if is_byte_level and decoder.decode([token]) != token:  # its characters are the alphabet's names of other bytes
            raise UsageError(f"--special-token {token!r}: its characters stand for other bytes in a byte-level vocabulary; use ASCII")


def pre_tokenizer_of(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _backend(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer_of(pattern)
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
