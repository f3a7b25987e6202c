"""The native library's words and merges beside those of `tokenizers`: the same tokenizer.json to the last byte."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmctl.core import sharedlib
from llmctl.core.tokenizer import TokenizerTrained, train_tokenizer
from llmctl.core.tokenizer import intake as intake_module
from llmctl.core.tokenizer import words as words_module
from llmctl.core.tokenizer.words import WordCounter
from tests.core.native.models import runnable_kernels
from tests.core.tokenizer_kinds import CHINESE, ENGLISH

CODE = Path(intake_module.__file__).read_text(encoding="utf-8")
EMOJI = "\U0001f98a 👩‍👩‍👧🇩🇪 it's I'VE don'\u017f !!\r\n\r\n  x = 12345.678;\t// \u0301é  \x1c \u3000\u2028 ٣٤ ½ Ⅷ\n"

pytestmark = pytest.mark.skipif(not runnable_kernels(), reason="the native library was not built")


def some_text(num_words: int, seed: int) -> str:
    """Words of few letters (so that many pairs are equally frequent), Chinese, numbers, odd blanks."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdeé國", k=generator.randrange(1, 9))) for _ in range(4000)]
    blanks = [" "] * 12 + ["\n", "\n\n", "  \n", "\t", "\r\n", "\u3000", "'s ", ", ", "! ", " 12 345 "]
    return "".join(generator.choice(words) + generator.choice(blanks) for _ in range(num_words))


def train(texts: list[str], **settings: Any) -> TokenizerTrained:
    """The last event."""
    *_, last = train_tokenizer(texts, **{"vocab_size": 3000, **settings})
    assert isinstance(last, TokenizerTrained)
    return last


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [
        some_text(10_000, seed=0),
        ENGLISH * 20 + "<|endoftext|>" + CHINESE * 20,
        EMOJI * 30,
        CODE,
        some_text(20_000, seed=1),
        "國" * 300,
    ]


@pytest.fixture(autouse=True)
def small_texts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "HEAD_CHARS", 1)


def by_tokenizers(texts: list[str], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> TokenizerTrained:
    with monkeypatch.context() as patch:
        patch.setattr(sharedlib, "PATH", Path("/nowhere"))
        result = train(texts, **settings)
    assert result.trainer == "tokenizers"
    assert "not built" in str(result.trainer_reason)
    return result


@pytest.mark.parametrize("pattern", ["llama3", "gpt2"])
@pytest.mark.parametrize("sample_bytes", [None, 60_000])
def test_the_tokenizer_is_that_of_tokenizers(
    corpus: list[str], pattern: str, sample_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"special_tokens": ["<|note|>"], "pattern": pattern, "sample_bytes": sample_bytes}
    native, plain = train(corpus, **settings), by_tokenizers(corpus, monkeypatch, **settings)
    assert native.trainer == "native"
    assert native.tokenizer.to_json() == plain.tokenizer.to_json()
    assert native.tokenizer.is_byte_complete
    assert (native.heldout_bytes, native.heldout_tokens) == (plain.heldout_bytes, plain.heldout_tokens)


@pytest.mark.parametrize("settings", [{"vocab_size": 5000}, {"min_frequency": 500, "vocab_size": 1500}, {"min_frequency": 1}], ids=str)
def test_an_end_before_the_vocabulary_is_full_is_the_same(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [ENGLISH * 3, some_text(5000, seed=2)]
    native = train(texts, **settings)
    assert native.trainer == "native"
    assert native.tokenizer.to_json() == by_tokenizers(texts, monkeypatch, **settings).tokenizer.to_json()


def test_a_small_text_is_left_to_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "HEAD_CHARS", 1 << 20)
    assert "the text is small" in str(train([ENGLISH]).trainer_reason)


def test_merges_that_differ_on_a_sample_are_not_used(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = words_module.byte_to_char()
    monkeypatch.setattr(words_module, "byte_to_char", lambda: table[::-1])
    result = train(corpus[:1])
    assert result.trainer == "tokenizers"
    assert "differ" in str(result.trainer_reason)


def test_a_full_table_forgets_the_rarest_and_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(3)
    texts = [f"w{generator.randrange(generator.choice((100, 20_000)))}" for _ in range(40_000)]
    exact = Counter(text.encode() for text in texts)

    def counted() -> tuple[dict[bytes, int], words_module.Words]:
        counter = WordCounter("gpt2")
        for start in range(0, len(texts), 1000):
            counter.add([" ".join(["", *texts[start : start + 1000]])])
        words = counter.take()
        return {words.word(i).strip(): int(words.counts[i]) for i in range(len(words.counts))}, words

    # GPT-2's pattern cuts letters from digits: " w" and the number, whose first occurrences are what fills the table.
    monkeypatch.setattr(words_module, "_MAX_TABLE_BYTES", 8000)
    found, words = counted()
    assert len(found) < len(exact)
    assert words.num_dropped > 0
    assert found.pop(b"w") == len(texts)
    for word, count in exact.items():
        assert count - words.most_missed <= found.get(word[1:], 0) <= count
    assert sum(found.values()) + words.num_dropped == len(texts)
    assert counted()[0] == {b"w": len(texts), **found}  # and the same every time
