"""Training against a brute-force byte-pair encoding, and what its results promise: all bytes, bounds, the same for any threads."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llmctl.core.errors import InputError, UsageError
from llmctl.core.tokenizer import CorpusRead, Tokenizer, TokenizerTrained, train_tokenizer
from llmctl.core.tokenizer import intake as intake_module
from llmctl.core.tokenizer.byte_level import byte_to_char
from llmctl.core.tokenizer.intake import Sample, pieces_of, short_runs
from tests.core.tokenizer_kinds import CHINESE, CORPUS, ENGLISH

TEST_DATA = os.environ.get("LLMCTL_TEST_DATA")
needs_data = pytest.mark.skipif(TEST_DATA is None, reason="needs $LLMCTL_TEST_DATA")


def train(texts: list[str], **settings: Any) -> TokenizerTrained:
    """The last event."""
    *_, last = train_tokenizer(texts, **{"vocab_size": 400, **settings})
    assert isinstance(last, TokenizerTrained)
    return last


def words_of(tokenizer: Tokenizer, texts: list[str]) -> Counter[str]:
    """Word (in the alphabet of bytes) -> how often the pre-tokeniser finds it."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    return Counter(word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def brute_force_bpe(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding by its definition: join the most frequent pair; of equals, the pair of the lowest ids."""
    ids = {char: number for number, char in enumerate(sorted(byte_to_char()))}
    parts = {word: list(word) for word in words}
    merges = []
    for _ in range(num_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for left, right in zip(parts[word], parts[word][1:], strict=False):
                pairs[left, right] += count
        best = max(pairs, key=lambda pair: (pairs[pair], -ids[pair[0]], -ids[pair[1]]))
        if pairs[best] < 2:
            break
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        for word, letters in parts.items():
            joined: list[str] = []
            place = 0
            while place < len(letters):
                if tuple(letters[place : place + 2]) == best:
                    joined.append("".join(best))
                    place += 2
                else:
                    joined.append(letters[place])
                    place += 1
            parts[word] = joined
    return merges


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_merges_are_those_of_the_definition(pattern: str) -> None:
    # A corpus of one piece, so that nothing is held out.
    text = ENGLISH + CHINESE
    result = train([text], pattern=pattern, vocab_size=256 + 1 + 60)
    assert not result.is_heldout
    merges = [tuple(pair) for pair in json.loads(result.tokenizer.to_json())["model"]["merges"]]
    assert merges == brute_force_bpe(words_of(result.tokenizer, list(short_runs(text))), 60)
    assert result.vocab_size == 256 + 1 + len(merges)


def test_word_level_keeps_the_most_frequent_words() -> None:
    result = train([ENGLISH], model="word", vocab_size=256 + 1 + 20, min_frequency=1)
    counts = words_of(result.tokenizer, [ENGLISH])
    kept = [token for token in result.tokenizer._ids if len(token) > 1 and token != "<|endoftext|>"]
    assert len(kept) == 20
    lowest = min(counts[word] for word in kept)
    assert all(count <= lowest for word, count in counts.items() if len(word) > 1 and word not in kept)
    ids = result.tokenizer.encode("zebra")
    assert [result.tokenizer.token_bytes()[i] for i in ids] == [1] * 5  # a word that is not kept is in bytes


@pytest.mark.parametrize("settings", [{}, {"pattern": "gpt2"}, {"model": "word"}, {"chat": True}], ids=str)
def test_all_bytes_are_there_and_special_tokens_come_last(settings: dict[str, Any]) -> None:
    tokenizer = train(["only ascii " * 9], special_tokens=["<|x|>"], vocab_size=300, **settings).tokenizer
    assert tokenizer.is_byte_complete
    assert tokenizer.decode_bytes([tokenizer._ids[char] for char in byte_to_char()]) == bytes(range(256))
    expected = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if settings.get("chat") else []), "<|x|>"]
    first = tokenizer.vocab_size - len(expected)
    assert tokenizer.special_tokens == {token: first + place for place, token in enumerate(expected)}
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert not tokenizer.adds_bos


PROGRAM = """
import sys
from llmctl.core.tokenizer import train_tokenizer
# many pairs of equal counts, so that an order that depends on threads or hashes would show
texts = ["".join(chr(97 + (i * j) % 26) for j in range(40)) + " " + chr(0x4E00 + i) * 3 for i in range(600)]
for model in ("bpe", "word"):
    *_, last = train_tokenizer(texts, vocab_size=1200, model=model)
    print(last.tokenizer.fingerprint, last.heldout_tokens)
"""


def test_the_result_is_the_same_for_any_number_of_threads() -> None:
    results = set()
    for threads in ("1", "2", "2", "5"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True, timeout=240)
        results.add(done.stdout)
    assert len(results) == 1


def test_a_sample_is_within_its_budget_and_depends_on_corpus_and_seed_alone() -> None:
    def texts() -> Iterator[str]:
        return (f"line {i} of a corpus that is larger than the budget\n" * 20 for i in range(3000))

    def sampled(seed: int, budget: int) -> tuple[list[str], list[str]]:
        sample = Sample(budget, seed=seed)
        for piece in (piece for text in texts() for piece in pieces_of(text)):
            sample.add(piece)
            assert sample.kept_bytes <= budget
        assert sample.num_bytes == sum(len(text) for text in texts())
        return sample.split()

    training, heldout = sampled(0, 200_000)
    assert (training, heldout) == sampled(0, 200_000)
    assert training != sampled(1, 200_000)[0]
    assert 190_000 < sum(map(len, training + heldout)) <= 200_000
    assert not set(training) & set(heldout)
    assert heldout
    # a smaller budget gives a part of the larger sample
    smaller = sampled(0, 50_000)
    assert set(smaller[0] + smaller[1]) < set(training + heldout)
    # pieces from everywhere
    numbers = sorted(int(text.split()[1]) for text in training)
    assert numbers[0] < 300
    assert numbers[-1] > 2700


def test_pieces_joined_are_the_text() -> None:
    for text in ("", "a", "x" * 20_000, "word " * 5000, "line\n" * 5000, "\n" * 20_000, "你好" * 9000):
        assert "".join(pieces_of(text)) == text
        assert max((len(piece) for piece in pieces_of(text)), default=0) <= 8192
        assert "".join(short_runs(text)) == text


def test_long_runs_without_white_space_are_cut_for_training() -> None:
    assert max(len(word) for text in short_runs("汉" * 1000 + " x") for word in text.split()) == 64
    assert list(short_runs("short words only")) == ["short words only"]


def test_bytes_per_token_is_what_encoding_gives() -> None:
    corpus = ["abcdefgh" * 2000]
    result = train(corpus)
    assert result.is_heldout
    tokens = len(result.tokenizer.encode("abcdefgh" * 1000))
    assert result.bytes_per_token == result.heldout_bytes / result.heldout_tokens
    assert result.bytes_per_token == pytest.approx(8000 / tokens, rel=0.1)


def test_progress_comes_before_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_REPORT_BYTES", 1 << 20)
    events = list(train_tokenizer([ENGLISH * 100] * 100, vocab_size=300, sample_bytes=100_000))
    assert [type(event) for event in events[:-1]] == [CorpusRead] * (len(events) - 1)
    assert [event.is_last for event in events[:-1]] == [False] * (len(events) - 2) + [True]  # type: ignore[union-attr]
    assert len(events) > 3


def test_chinese_gets_tokens_of_whole_characters_and_more() -> None:
    result = train([CHINESE * 40], vocab_size=500)
    ids = result.tokenizer.encode(CHINESE)
    assert len(CHINESE.encode()) / len(ids) > 3
    assert result.tokenizer.decode(ids) == CHINESE


@needs_data
def test_real_chinese_and_english_compress() -> None:
    folder = Path(str(TEST_DATA)) / "corpora"
    poems = gzip.decompress((folder / "zh_tang_poems_12k.txt.gz").read_bytes()).decode()[:400_000]
    english = (folder / "tinyshakespeare.txt").read_text()[:400_000]
    for text, least in ((poems, 2.4), (english, 2.8)):
        assert train([text], vocab_size=4096).bytes_per_token > least


def test_wrong_settings_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="at least 259"):
        train(CORPUS, vocab_size=258, chat=True)
    for token in ("", "x", " <a>", "<a>\n"):
        with pytest.raises(UsageError, match="--special-token"):
            train(CORPUS, special_tokens=[token])
    with pytest.raises(UsageError, match="use ASCII"):
        train(CORPUS, special_tokens=["é¢"])


def test_special_tokens_in_another_script_decode_to_themselves() -> None:
    tokenizer = train(CORPUS, special_tokens=["<|结束|>"]).tokenizer
    ids = tokenizer.encode("a<|结束|>b", allow_special=True)
    assert tokenizer.token_id("<|结束|>") in ids
    assert tokenizer.decode(ids) == "a<|结束|>b"


@pytest.mark.parametrize("texts", [[], [""], ["", "\n \n"]])
def test_a_corpus_without_text_is_an_input_error(texts: list[str]) -> None:
    with pytest.raises(InputError, match="no text"):
        train(texts)
