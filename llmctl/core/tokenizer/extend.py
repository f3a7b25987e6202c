"""More vocabulary for a byte-pair encoding that is there. Knows tokenizer.json; knows no models and no files.

Every id and every merge stays. New merges get ranks after the old ones: a word is joined as before, and then on. The words
of the text are therefore encoded by the old tokenizer, and the native library goes on from there.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from llmctl.core.errors import LlmctlError, UsageError
from llmctl.core.tokenizer.byte_level import byte_to_char
from llmctl.core.tokenizer.chatml import CHATML_TEMPLATE, CHATML_TOKENS
from llmctl.core.tokenizer.intake import CorpusRead, read_corpus, short_runs
from llmctl.core.tokenizer.parts import backend_errors, parts_of, state_of, unknown_id
from llmctl.core.tokenizer.tokenizer import Tokenizer
from llmctl.core.tokenizer.train import TokenizerTrained, check_special_tokens, pre_tokenizer_of, proven_counter, trained
from llmctl.core.tokenizer.words import PATTERNS, Learned, NotNativeError, WordCounter, Words, learn_on

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SENTENCEPIECE_WORD = re.compile("▁*[^▁]+|▁+")


def extend_tokenizer(
    base: Tokenizer,
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    chat: bool = False,
    chat_template: str | None = None,
    sample_bytes: int | None = None,
    min_frequency: int = 2,
    seed: int = 0,
) -> Iterator[CorpusRead | TokenizerTrained]:
    """Extend `base` to `vocab_size` ids by merges learnt on `texts`; the events end with TokenizerTrained.

    Special tokens that `base` lacks (with `chat` those of ChatML) get the last ids. Text is cut as `base` cuts it; one of
    SentencePiece that does not cut is taught words. `sample_bytes`, `min_frequency` and `seed` as in train_tokenizer.

    Raises UsageError for another kind of tokenizer and for a size too small, LlmctlError without the native library, InputError
    for an empty corpus.
    """
    content = json.loads(base.to_json(pretty=False))
    _check_kind(content["model"])
    specials = [token for token in dict.fromkeys([*(CHATML_TOKENS if chat else ()), *special_tokens]) if token not in base.special_tokens]
    check_special_tokens(specials, is_byte_level=base.is_byte_level)
    num_new = vocab_size - base.vocab_size - len(specials)
    if num_new < 0:
        raise UsageError(
            f"--vocab-size {vocab_size}: the tokenizer of --from has {base.vocab_size:,} ids already, and {len(specials)} special"
            f" tokens are new; {base.vocab_size + len(specials):,} at least are wanted"
        )
    pattern = _native_pattern(base)
    try:
        WordCounter(PATTERNS[0]).close()
    except NotNativeError as error:
        raise LlmctlError(f"--from cannot do without the native library: {error}") from error

    def open_counter(head: Sequence[str]) -> WordCounter:
        if pattern is None:
            raise NotNativeError("it does not know this tokenizer's way of cutting text into words")
        return proven_counter(head, pattern, min_frequency)

    read = yield from read_corpus(texts, open_counter=open_counter, sample_bytes=sample_bytes, seed=seed)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    counts = _named(read.words) if read.words is not None else _counted(backend, read.training).items()
    learned, num_known = _learn(base, backend, counts, specials, num_new=num_new, min_frequency=min_frequency)
    content = _extended(content, base, learned, num_known, specials)
    with backend_errors("the extended tokenizer"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    result = Tokenizer.from_parts(
        backend,
        bos=base.bos_token,
        eos=base.eos_token,
        pad=base.pad_token,
        chat_template=chat_template if chat_template is not None else CHATML_TEMPLATE if chat else base.chat_template,
        model_max_length=base.model_max_length,
    )
    yield trained(result, read, base=base)


def _check_kind(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise UsageError(f"--from: a tokenizer of kind {model.get('type')} has no merges to go on from; a byte-pair encoding is wanted")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UsageError("--from: this tokenizer marks parts of words (a prefix or suffix), which is not supported")


def _native_pattern(base: Tokenizer) -> str | None:
    """The pattern of the native library that cuts text as `base` does, if there is one."""
    if base.structure["normalizer"] is not None:
        return None

    def essence(state: dict[str, Any] | None) -> list[dict[str, Any]]:
        return [{key: v for key, v in part.items() if key not in ("trim_offsets", "pretokenizers")} for part in parts_of(state or {})]

    wanted = essence(base.structure["pre_tokenizer"])
    return next((name for name in PATTERNS if essence(state_of(pre_tokenizer_of(name))) == wanted), None)


def _named(words: Words) -> Iterator[tuple[str, int]]:
    """Words in the alphabet of bytes, as the model gets them."""
    table = dict(enumerate(byte_to_char()))
    return ((words.word(i).decode("latin-1").translate(table), count) for i, count in enumerate(words.counts.tolist()))


def _counted(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in (part for text in texts for part in short_runs(text)):
        plain = part if backend.normalizer is None else backend.normalizer.normalize_str(part)
        if backend.pre_tokenizer is None:
            counts.update(_SENTENCEPIECE_WORD.findall(plain))
        else:
            counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain))
    return counts


def _learn(
    base: Tokenizer,
    backend: tokenizers.Tokenizer,
    counts: Iterable[tuple[str, int]],
    specials: Sequence[str],
    *,
    num_new: int,
    min_frequency: int,
) -> tuple[Learned, int]:
    """New merges on words that `backend` has encoded, and how many of the tokens were known before."""
    by_id = sorted((token_id, token) for token, token_id in backend.get_vocab(with_added_tokens=True).items())
    places = {token_id: place for place, (token_id, _) in enumerate(by_id)}
    unknown = unknown_id(backend)
    # What stands for no text of its own is never joined to anything: control tokens, the unknown one, bytes of last resort.
    barred = {token_id for token_id, token in by_id if token_id in base.special_ids or token_id == unknown or _BYTE_TOKEN.fullmatch(token)}
    tokenize = backend.model.tokenize
    symbols: list[int] = []
    ends, numbers = [0], list[int]()

    def finish(count: int) -> None:
        if len(symbols) - ends[-1] > 1:
            ends.append(len(symbols))
            numbers.append(count)
        else:
            del symbols[ends[-1] :]

    for word, count in counts:
        for token in tokenize(word):
            if token.id in barred:
                finish(count)
            else:
                symbols.append(places[token.id])
        finish(count)
    known = [*(token for _, token in by_id), *specials]
    learned = learn_on(
        np.array(symbols, dtype=np.uint32),
        np.array(ends, dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        known,
        vocab_size=len(known) + num_new,
        min_frequency=min_frequency,
        num_closed=len(known),
    )
    return learned, len(known)


def _extended(content: dict[str, Any], base: Tokenizer, learned: Learned, num_known: int, specials: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json with the new tokens after all old ids."""
    model = content["model"]
    # An added token that the model does not know is numbered after the model's tokens when it is loaded: it would move.
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    new = {token: base.vocab_size + place for place, token in enumerate(learned.tokens[num_known:])}
    special = {token: base.vocab_size + len(new) + place for place, token in enumerate(specials)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        **content,
        "added_tokens": [*content["added_tokens"], *({"id": i, "content": token, **plain} for token, i in special.items())],
        "model": {
            **model,
            "vocab": {**model["vocab"], **{t: i for t, i in added.items() if t not in model["vocab"]}, **new, **special},
            "merges": [*model["merges"], *([left, right] for left, right in learned.merges)],
        },
    }
