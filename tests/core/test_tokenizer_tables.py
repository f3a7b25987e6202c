"""Tables of tokenizers: the ids of `tokenizers`, or no answer; kept in files that are of the right tokenizer and whole, or not used."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmctl.core.checkpoint.kepttokens import keep_tokenizer, key_of, load_kept, tokenizer_of
from llmctl.core.errors import InputError
from llmctl.core.tokenizer import Tokenizer
from llmctl.core.tokenizer.plain import MOST_CHARS, PlainEncoder
from llmctl.core.tokenizer.tabulate import NotTabulatedError, tabulate
from tests.core.tokenizer_kinds import CORPUS, ENGLISH, KINDS, TEXTS, trained, write_kind

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


# What the hub holds: SmolLM2 and StarCoder; Llama 3; Qwen 2.
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"cut": pre_tokenizers.ByteLevel(add_prefix_space=False)},
    "smollm2": {"cut": DIGITS},
    "llama3": {"cut": split(LLAMA3), "ignore_merges": True, "bos": True},
    "qwen2": {"cut": split(LLAMA3.replace("{1,3}", "")), "normalizer": normalizers.NFC()},
}


def made(shape: str, *, alphabet: bool = True) -> Tokenizer:
    """A tokenizer of that shape, trained by `tokenizers`; without `alphabet` it lacks ids for bytes."""
    how = SHAPES[shape]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=how.get("ignore_merges", False)))
    backend.pre_tokenizer, backend.decoder = how["cut"], decoders.ByteLevel()
    if "normalizer" in how:
        backend.normalizer = how["normalizer"]
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    names = ["<|begin|>", "<|end|>", "<|end|>x"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=letters, show_progress=False)
    )
    if how.get("bos"):
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return Tokenizer.from_parts(backend, bos="<|begin|>", eos="<|end|>", pad=None)


def encoder_of(tokenizer: Tokenizer) -> PlainEncoder:
    facts, tables = tabulate(tokenizer)
    return PlainEncoder(json.loads(json.dumps(facts)), {name: memoryview(table.tobytes()) for name, table in tables.items()})


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, PlainEncoder]:
    """A tokenizer and its tables."""
    tokenizer = made(request.param)
    return tokenizer, encoder_of(tokenizer)


def check(pair: tuple[Tokenizer, PlainEncoder], text: str) -> int:
    """Compare the two with and without control tokens and frame; how often the tables answered."""
    tokenizer, plain = pair
    answers = 0
    for special in (False, True):
        for add_bos in (None, False):
            found = plain.encode(text, special=special, post=add_bos is None)
            answers += found is not None
            assert found is None or found == tokenizer.encode(text, allow_special=special, add_bos=add_bos), text
    return answers


def test_the_ids_are_those_of_tokenizers(pair: tuple[Tokenizer, PlainEncoder]) -> None:
    for text in TEXTS:
        check(pair, text)
    ordinary = (ENGLISH, "", "x", "I'M you're WE'LL 12345 1 12 1234\n\n  \t tail  ", "naïve Öl, привет мир, 春眠不觉晓 한국어 “ok” — 5€")
    assert [check(pair, text) for text in ordinary] == [4] * len(ordinary)
    named = "<|end|>a <|end|>x <|begin|><|end|>"
    assert check(pair, named) == 2, "names are tokens where that is asked for, else no text for the tables"


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "the", "'s", "'S", " ", "\n", "\r", "12", "é", "ж", "漢", "ſ", "½", "\u0301", "<|end|>", "x", "-", "\x1c"])
    )
)
def test_any_mixture_has_the_same_ids_or_no_answer(pair: tuple[Tokenizer, PlainEncoder], atoms: list[str]) -> None:
    check(pair, "".join(atoms))


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_has_the_same_ids_or_no_answer(pair: tuple[Tokenizer, PlainEncoder], text: str) -> None:
    check(pair, text.encode("utf-8", "replace").decode())


def test_bytes_of_ids_are_those_of_the_tokenizer(pair: tuple[Tokenizer, PlainEncoder]) -> None:
    tokenizer, plain = pair
    for token_id in (*range(tokenizer.vocab_size), tokenizer.vocab_size, -1):
        assert plain.bytes_of(token_id) == tokenizer.decode_bytes([token_id])


def test_what_the_tables_cannot_say_is_refused_or_left_to_tokenizers(tmp_path: Path) -> None:
    taken = set()
    for kind in KINDS:
        (folder := tmp_path / kind).mkdir()
        write_kind(folder, kind)
        tokenizer = Tokenizer.load(folder)
        try:
            both = tokenizer, encoder_of(tokenizer)
        except NotTabulatedError:
            continue
        taken.add(kind)
        for text in TEXTS:
            check(both, text)
    assert taken < set(KINDS), "SentencePiece and WordPiece are none of theirs"
    lacking = made("gpt2", alphabet=False)
    plain = encoder_of(lacking)
    assert plain.encode("Once upon a time", special=False, post=False) == lacking.encode("Once upon a time")
    assert lacking.missing_bytes
    assert plain.encode("Q~Z^`", special=False, post=False) is None


def test_who_encodes_much_is_sent_to_tokenizers() -> None:
    plain = encoder_of(made("gpt2"))
    text = "word " * (MOST_CHARS // 50)
    answers = [plain.encode(text, special=False, post=True) is not None for _ in range(12)]
    assert answers == [True] * 10 + [False] * 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMCTL_CACHE_BYTES", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer that chats."""
    folder = tmp_path / "model"
    folder.mkdir()
    trained(vocab_size=500).save(folder)
    return folder


def opened(folder: Path) -> Tokenizer:
    """By tables where there are some; what is made of them beside is waited for."""
    tokenizer = tokenizer_of(folder, smallest_bytes=0)
    for thread in threading.enumerate():
        if thread.name == "llmctl tokenizer":
            thread.join()
    return tokenizer


def is_tabulated(tokenizer: Tokenizer) -> bool:
    return type(tokenizer) is not Tokenizer


def test_the_second_start_reads_tables_and_says_the_same(cache: Path, folder: Path) -> None:
    first = opened(folder)
    first.chat_template = "another, for this run alone"
    second, plain = opened(folder), Tokenizer.load(folder)
    assert (is_tabulated(first), is_tabulated(second)) == (False, True)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids", "special_tokens", "chat_template", "model_max_length"):
        assert getattr(second, name) == getattr(plain, name), name
    for name in ("adds_bos", "is_byte_complete", "is_lossless", "structure", "fingerprint", "end_of_turn_ids", "reaches_control"):
        assert getattr(second, name) == getattr(plain, name), name
    messages = [{"role": "user", "content": "Once upon a <|im_end|> time"}]
    assert second.encode_chat(messages, add_generation_prompt=True) == plain.encode_chat(messages, add_generation_prompt=True)
    ids = plain.encode(ENGLISH)
    stream = second.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == ENGLISH == second.decode(ids)
    with pytest.raises(InputError, match="surrogate"):
        second.encode("\ud800")


def test_a_plain_text_needs_no_tokenizers(cache: Path, folder: Path) -> None:
    opened(folder)
    program = (
        "import sys; from pathlib import Path; from llmctl.core.checkpoint.kepttokens import tokenizer_of; "
        "words = tokenizer_of(Path(sys.argv[1]), smallest_bytes=0); ids = words.encode('Once upon a time'); stream = words.stream(); "
        "print(''.join(map(stream.push, ids)), words.vocab_size, 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "Once upon a time 500 False\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"]
)
def test_a_file_that_changes_comes_or_goes_makes_another_tokenizer(cache: Path, folder: Path, name: str) -> None:
    before = key_of(folder, smallest_bytes=0)
    path = folder / name
    path.write_text(path.read_text() + "\n" if path.exists() else "{}")
    assert key_of(folder, smallest_bytes=0) != before


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-5000] + b"\xff" + data[-4999:]])
def test_damaged_tables_are_not_used(cache: Path, folder: Path, damage: Any) -> None:
    opened(folder)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = opened(folder)
    assert not is_tabulated(again)
    assert again.encode("Once upon") == Tokenizer.load(folder).encode("Once upon")


def test_a_tokenizer_without_tables_is_tried_once(cache: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "llama2").mkdir()
    write_kind(folder, "llama2")
    assert not is_tabulated(opened(folder))
    (path,) = cache.iterdir()
    written = path.stat().st_ino
    assert not is_tabulated(opened(folder))
    assert path.stat().st_ino == written


def test_small_ones_and_caches_that_are_off_keep_nothing(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(folder) is None
    key = key_of(folder, smallest_bytes=0)
    assert key is not None
    monkeypatch.setenv("LLMCTL_CACHE_BYTES", "0")
    assert key_of(folder, smallest_bytes=0) is None
    assert keep_tokenizer(key, Tokenizer.load(folder), named={}) is None
    assert load_kept(key, reopen=lambda: Tokenizer.load(folder)) is None
    assert not cache.exists()
