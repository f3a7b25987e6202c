"""gigatoken's merges beside those of `tokenizers`: the same tokenizer.json to the last byte, or `tokenizers` learns them."""

import random
import sys
from typing import Any

import pytest

from llmctl.core.tokenizer import TokenizerTrained, train_fast, train_tokenizer
from tests.core.tokenizer_kinds import CHINESE, ENGLISH


def some_text(num_words: int, seed: int) -> str:
    """Words of few letters (so that many pairs are equally frequent), Chinese, numbers, odd blanks."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdeé國", k=generator.randrange(1, 9))) for _ in range(4000)]
    blanks = [" "] * 12 + ["\n", "\n\n", "  \n", "\t", "\r\n", "\u3000", "'s ", ", ", "! ", " 12 345 "]
    return "".join(generator.choice(words) + generator.choice(blanks) for _ in range(num_words))


def train(texts: list[str], **settings: Any) -> TokenizerTrained:
    """The last event."""
    *_, last = train_tokenizer(texts, **{"vocab_size": 3000, "pattern": "gpt2", **settings})
    assert isinstance(last, TokenizerTrained)
    return last


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [some_text(30_000, seed=0), ENGLISH * 20 + "<|endoftext|>" + CHINESE * 20, some_text(90_000, seed=1), "\0\0llmctl\0\0 " * 50]


def without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)


def test_the_tokenizer_is_that_of_tokenizers(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(train_fast, "_SMALLEST_BYTES", 0)
    fast = train(corpus, special_tokens=["<|note|>"])
    without_gigatoken(monkeypatch)
    plain = train(corpus, special_tokens=["<|note|>"])
    assert (fast.trainer, plain.trainer) == ("gigatoken", "tokenizers")
    assert fast.tokenizer.to_json() == plain.tokenizer.to_json()
    assert fast.tokenizer.is_byte_complete
    assert "llmctl[fast]" in str(plain.trainer_reason)


def test_what_gigatoken_does_not_know_is_left_to_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    assert "the text is small" in str(train([ENGLISH]).trainer_reason)
    monkeypatch.setattr(train_fast, "_SMALLEST_BYTES", 0)
    assert "--pattern gpt2" in str(train([ENGLISH], pattern="llama3", vocab_size=300).trainer_reason)


@pytest.mark.parametrize("settings", [{"vocab_size": 5000}, {"min_frequency": 2000, "vocab_size": 1500}, {"min_frequency": 1}])
def test_an_end_before_the_vocabulary_is_full_is_the_same(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(train_fast, "_SMALLEST_BYTES", 0)
    texts = [ENGLISH * 3, some_text(5000, seed=2)]
    fast = train(texts, **settings)
    without_gigatoken(monkeypatch)
    assert fast.trainer == "gigatoken"
    assert fast.tokenizer.to_json() == train(texts, **settings).tokenizer.to_json()


def test_merges_that_differ_on_a_sample_are_not_used(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(train_fast, "_SMALLEST_BYTES", 0)
    learn = train_fast._learn
    monkeypatch.setattr(train_fast, "_learn", lambda *arguments: learn(*arguments)[::-1])
    result = train(corpus[:1])
    assert result.trainer == "tokenizers"
    assert "differ" in str(result.trainer_reason)


def test_a_process_that_dies_is_no_failure_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(train_fast, "_SMALLEST_BYTES", 0)
    monkeypatch.setattr(train_fast, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
    assert "status -9" in str(train([ENGLISH], vocab_size=300).trainer_reason)
