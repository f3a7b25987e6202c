"""`llmctl tokenize inspect` beside counting by hand with `tokenizers`."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmctl.core.data.inspect import Inspection, parts_of
from llmctl.core.tokenizer import Tokenizer

from .in_process import Completed, run_here
from .test_boundary import environment

TEXT = "The fox runs; лиса бежит, 狐狸跑了! 12 34\n" * 3


def llmctl(*arguments: object) -> Completed:
    return run_here([*map(str, arguments)], env=environment())


def make(vocab_size: int) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["The fox runs, the fox sees. лиса бежит"] * 5, trainer)
    return Tokenizer.from_parts(backend, bos=None, eos="<|endoftext|>", pad=None)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    for name, size in (("small", 260), ("large", 300)):
        (folder / name).mkdir()
        make(size).save(folder / name)
    return folder / "small", folder / "large"


def test_the_sums_are_those_of_counting() -> None:
    tokenizer = make(300)
    found = Inspection("x", tokenizer)
    found.add("in", TEXT)
    ids = tokenizer.encode(TEXT)
    assert (found.total.tokens, found.total.characters, found.total.bytes) == (len(ids), len(TEXT), len(TEXT.encode()))
    assert found.total.words == len(re.findall(r"\w+", TEXT)) == 3 * 8
    assert set(found.used) == set(ids)
    rows = found.by_script
    assert set(rows) == {"LATIN", "CYRILLIC", "CJK", "(none)"}
    for name in ("tokens", "characters", "bytes", "words"):
        assert sum(getattr(row, name) for row in rows.values()) == getattr(found.total, name), name
    assert rows["CJK"].tokens == rows["CJK"].bytes == 3 * 4 * 3, "it learnt no Chinese: a token a byte"
    unused = found.unused_ids()
    assert set(unused) == set(range(tokenizer.vocab_size)) - set(ids) - {tokenizer.eos_id}


def test_the_parts_joined_are_the_text() -> None:
    tokenizer = make(300)
    parts = parts_of(tokenizer, TEXT)
    assert "".join(re.sub(r"·\d+$", "", part) for part in parts) == TEXT
    assert "狐·3" in parts
    assert sum(int(found[1]) if (found := re.search(r"·(\d+)$", part)) else 1 for part in parts) == len(tokenizer.encode(TEXT))


def test_tokenizers_side_by_side(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("The fox\x1b[31m sees\n")
    done = llmctl("tokenize", "inspect", tmp_path / "a.txt", tmp_path / "b.txt", "--tokenizer", two[0], "--tokenizer", two[1])
    assert done.returncode == 0, done.stderr
    report = done.stdout.decode()
    assert "\x1b" not in report, "no colour off a terminal, and none from the text"
    for word in ("tokens a word", "characters a token", "CYRILLIC", "ids used", "a.txt", "b.txt"):
        assert word in report
    done = llmctl("tokenize", "inspect", tmp_path / "a.txt", "--tokenizer", two[0], "--tokenizer", two[1], "--json")
    facts = json.loads(done.stdout)
    assert [row["tokens"] for row in facts] == [len(make(size).encode(TEXT)) for size in (260, 300)]
    assert facts[0]["tokens_per_word"] > facts[1]["tokens_per_word"]


def test_what_is_missing_is_said(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert llmctl("tokenize", "inspect", tmp_path / "empty.txt", "--tokenizer", two[0]).returncode == 4
    assert llmctl("tokenize", "inspect", tmp_path / "empty.txt").returncode == 2
    assert llmctl("tokenize", "inspect", tmp_path / "none.txt", "--tokenizer", two[0]).returncode == 10
