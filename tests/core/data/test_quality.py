"""Quality tools: each beside a plain statement of what it does, counted, the same for any workers and after any interruption."""

import json
import signal
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.data import documents
from llmctl.core.data.packevents import Packed
from llmctl.core.data.quality import Cleaner, QualityRules, evaluation_texts, read_patterns, script_of
from llmctl.core.errors import InputError, Interrupted, MissingExtraError, NotFoundError, UsageError
from llmctl.core.tokenizer import Tokenizer

from .test_pack import hashes, run, some_documents, stream_of, write_jsonl

QUESTION = "Which of these four animals is known for running after its own tail in the early morning hours of spring?"


def texts_in(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The documents of a packed folder's train split, decoded."""
    ids, ends = stream_of(folder, "train")
    return [tokenizer.decode_bytes(ids[a : b - 1]).decode() for a, b in zip([0, *ends], ends, strict=False)]


def packed(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer, tokenizer_dir: Path, **settings: Any
) -> tuple[list[str], dict[str, int]]:
    """What becomes of `texts`, and the counts."""
    corpus = write_jsonl(tmp_path / "docs.jsonl", texts)
    done = run(corpus, tmp_path / "out", tokenizer_dir, val_fraction=0, **settings)[-1]
    assert isinstance(done, Packed)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quality"] == done.quality
    return texts_in(tmp_path / "out", tokenizer), done.quality


def test_nfc(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    texts = ["e\u0301tude", "plain", "Å", "한"]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, normalize="nfc")
    assert found == [unicodedata.normalize("NFC", text) for text in texts]
    assert counts == {"normalized": sum(a != b for a, b in zip(texts, found, strict=True))}


def test_ftfy(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ftfy = pytest.importorskip("ftfy")
    texts = ["The MÃ©nage", "schÃ¶n", "fine"]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, normalize="ftfy")
    assert found == [ftfy.fix_text(text) for text in texts] == ["The Ménage", "schön", "fine"]
    assert counts == {"normalized": 2}
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"llmctl\[quality\]"):
        run(tmp_path / "docs.jsonl", tmp_path / "other", tokenizer_dir, normalize="ftfy")
    assert not (tmp_path / "other").exists()


def test_length_and_script(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    texts = [
        "short",
        "a text of a fair length",
        "x" * 60,
        "текст подлиннее, по-русски",
        "ひらがなばかりのながい文章です",
        "1234567890 1234 !!",
    ]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, min_chars=10, max_chars=50, script=("latin", "CJK"))
    assert found == ["a text of a fair length"]
    assert counts == {"too_short": 1, "too_long": 1, "other_script": 3}
    assert [script_of(char) for char in "aЯ國のｶ한"] == ["LATIN", "CYRILLIC", "CJK", "HIRAGANA", "HALFWIDTH", "HANGUL"]


def test_redaction(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    (tmp_path / "secrets.toml").write_text("EMAIL = '[\\w.+-]+@[\\w-]+\\.\\w+'\nKEY = 'sk-[A-Za-z0-9]{8,}'\n")
    texts = ["write to a.b@example.org or c@d.de", "sk-0123456789abc is mine", "nothing"]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, redact=tmp_path / "secrets.toml")
    assert found == ["write to [EMAIL] or [EMAIL]", "[KEY] is mine", "nothing"]
    assert counts == {"redacted": 3}
    for content, message in (
        ("A = '['", "A: "),
        ("A = 'x*'", "matches something"),
        ("", "no patterns"),
        ("A = 1", "A: "),
        ("A", "TOML|Expected"),
    ):
        (tmp_path / "bad.toml").write_text(content)
        with pytest.raises(UsageError, match=message):
            read_patterns(tmp_path / "bad.toml")
    with pytest.raises(NotFoundError):
        read_patterns(tmp_path / "none.toml")


def test_exact_duplicates(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    texts = [*some_documents(60, seed=1), *some_documents(60, seed=1)[::-1], "one more"]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, dedupe="exact")
    assert found == list(dict.fromkeys(texts))
    assert counts == {"duplicates": len(texts) - len(found)}


def test_near_duplicates(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    pytest.importorskip("rensa")
    words = [f"word{number}" for number in range(300)]
    other = [f"thing{number}" for number in range(300)]
    near, far = [*words[:150], "changed", *words[151:]], [*words[:150], *other[:150]]
    texts = [" ".join(row) for row in (words, other, near, far, words)]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, dedupe="near")
    assert found == [texts[0], texts[1], texts[3]]
    assert counts == {"duplicates": 2}


def test_chance_of_near_duplicates_is_that_of_the_formula() -> None:
    """Pairs of known overlap meet about as often as 1 - (1 - j^8)^16 says."""
    pytest.importorskip("rensa")
    cleaner = Cleaner(QualityRules(dedupe="near"))
    for shared, total in ((40, 60), (55, 60)):
        met = 0
        for trial in range(150):
            first = [f"t{trial}w{number}" for number in range(total + 4)]
            second = [*first[: shared + 4], *(f"u{trial}w{number}" for number in range(total - shared))]
            a, b = cleaner.keys_of([" ".join(first).encode(), " ".join(second).encode()])
            met += bool((a == b).any())
        overlap = shared / (2 * total - shared)
        assert abs(met / 150 - (1 - (1 - overlap**8) ** 16)) < 0.15


def test_decontamination(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    rows = [
        {"question": QUESTION, "choices": ["a dog", "a cat"]},
        {"nested": [{"text": "Only nine words are in this very short example."}]},
    ]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(evaluation_texts(tmp_path / "eval.jsonl")) == [QUESTION, "a dog", "a cat", rows[1]["nested"][0]["text"]]  # type: ignore[index]
    thirteen = " ".join(QUESTION.split()[3:16])
    twelve = " ".join(QUESTION.split()[3:15])
    texts = [
        f"He asked: {thirteen.upper()}!",
        f"He asked: {twelve} and so on",
        "only nine words, are in this very short EXAMPLE",
        "a dog and a cat",
    ]
    found, counts = packed(tmp_path, texts, tokenizer, tokenizer_dir, decontaminate=(str(tmp_path / "eval.jsonl"),))
    assert found == [texts[1], texts[3]]
    assert counts == {"contaminated": 2}
    with pytest.raises(NotFoundError, match=r"none\.jsonl"):
        run(tmp_path / "docs.jsonl", tmp_path / "other", tokenizer_dir, decontaminate=(str(tmp_path / "none.jsonl"),))


ALL: dict[str, Any] = {"normalize": "nfc", "min_chars": 3, "max_chars": 3000, "dedupe": "exact", "val_fraction": 0.3, "shard_tokens": 2000}


def test_any_workers_and_any_interruption_give_the_same_bytes(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 4000)
    texts = [*some_documents(120, seed=1), *some_documents(120, seed=1), *some_documents(60, seed=2)]
    corpus = write_jsonl(tmp_path / "docs.jsonl", texts)
    run(corpus, tmp_path / "one", tokenizer_dir, **ALL)
    run(corpus, tmp_path / "two", tokenizer_dir, workers=2, **ALL)
    calls = iter([None] * 25 + [signal.SIGTERM] * 100)
    with pytest.raises(Interrupted):
        run(corpus, tmp_path / "broken", tokenizer_dir, stop=lambda: next(calls), **ALL)
    assert list((tmp_path / "broken").glob("*.tokens"))
    with pytest.raises(UsageError, match="quality"):
        run(corpus, tmp_path / "broken", tokenizer_dir, **{**ALL, "min_chars": 4})
    run(corpus, tmp_path / "broken", tokenizer_dir, **ALL)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "broken")


def test_filters_that_leave_nothing_are_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_jsonl(tmp_path / "docs.jsonl", ["abc"])
    with pytest.raises(InputError, match="left nothing"):
        run(corpus, tmp_path / "out", tokenizer_dir, min_chars=10)
    assert not (tmp_path / "out").exists()
