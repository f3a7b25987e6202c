"""Word vectors out and in, against gensim where it is installed and against its parser's rules where it is not."""

import io
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data.wordvectors import read_vectors, vector_names, vocabulary, write_vectors
from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.tokenizer import Tokenizer
from tests.tiny_data import make_tokenizer

ODD = ["two words", " ", "  ", "\n", "a\tb", "nbsp\u00a0here", "wide\u3000space", "\u2028", "ĠĠ", "aĠb", "a b"]


def odd_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with added tokens that hold white space, some of which would take the names of others."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a  b  c"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ODD])
    return Tokenizer.from_parts(backend, bos=None, eos=None, pad=None)


def write(path: Path, tokenizer: Tokenizer, table: np.ndarray, *, binary: bool) -> dict[int, str]:
    names = vector_names(tokenizer)
    with open(path, "wb") as file:
        write_vectors(file, names, table, binary=binary)
    return names


def random_table(rows: int, size: int = 7) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((rows, size)) * 10.0 ** rng.integers(-30, 30, (rows, size))).astype(np.float32)


def test_names_are_the_vocabularys_and_each_is_one_word_of_its_own() -> None:
    tokenizer = odd_tokenizer()
    names, tokens = vector_names(tokenizer), vocabulary(tokenizer)
    assert list(names) == list(tokens) == list(range(tokenizer.vocab_size))
    assert len(set(names.values())) == len(names)
    assert not any(char.isspace() for name in names.values() for char in name)
    assert all(names[i] == token for i, token in tokens.items() if token and not any(char.isspace() for char in token))
    by_token = {token: names[i] for i, token in tokens.items()}
    assert by_token["two words"] == "twoĠwords"
    assert by_token["a\tb"] == "aĉb"
    assert by_token["wide\u3000space"] == "wide<U+3000>space"
    assert by_token["aĠb"] == "aĠb"
    assert by_token["a b"] == f"aĠb#{tokenizer.token_id('a b')}"


@pytest.mark.parametrize("binary", [False, True])
def test_numbers_come_back_bit_for_bit(binary: bool, tmp_path: Path) -> None:
    tokenizer = odd_tokenizer()
    table = random_table(tokenizer.vocab_size + 3)  # rows beyond the tokenizer have no name
    names = write(tmp_path / "v", tokenizer, table, binary=binary)
    again = list(read_vectors(tmp_path / "v"))
    assert [name for name, _ in again] == list(names.values())
    assert all(np.array_equal(numbers, table[i]) for i, (_, numbers) in zip(names, again, strict=True))


def test_the_text_form_is_what_gensims_parser_splits(tmp_path: Path) -> None:
    """Its rule: strip the line's end, split at spaces; the first part is the word (gensim/models/keyedvectors.py)."""
    tokenizer = odd_tokenizer()
    table = random_table(tokenizer.vocab_size)
    names = write(tmp_path / "v.txt", tokenizer, table, binary=False)
    lines = (tmp_path / "v.txt").read_bytes().split(b"\n")
    assert lines[0].decode() == f"{len(names)} 7"
    assert lines[-1] == b""
    for (i, name), line in zip(names.items(), lines[1:-1], strict=True):
        word, *numbers = line.rstrip().decode("utf-8").split(" ")
        assert word == name
        assert np.array_equal(np.array(numbers, dtype=np.float32), table[i])


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_loads_every_vector(binary: bool, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models")
    for tokenizer in (odd_tokenizer(), make_tokenizer()):
        table = np.random.default_rng(0).standard_normal((tokenizer.vocab_size, 12), dtype=np.float32)
        names = write(tmp_path / "v", tokenizer, table, binary=binary)
        loaded = models.KeyedVectors.load_word2vec_format(str(tmp_path / "v"), binary=binary)
        assert loaded.index_to_key == list(names.values())
        assert np.array_equal(loaded.vectors, table[list(names)])
        loaded.save_word2vec_format(str(tmp_path / "back"), binary=binary)
        again = dict(read_vectors(tmp_path / "back"))
        assert all(np.array_equal(again[name], table[i]) for i, name in names.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line"),
        (b"hello\n", "first line"),
        (b"2 x\n", "first line"),
        (b"-1 4\n", "first line"),
        (b"0 4\n", "0 vectors"),
        (b"99999999999 4\n", "at most"),
        (b"1 99999999999\n", "at most"),
        (b"2 2\na 1 2\n", "row 2 of 2: the file ends"),
        (b"2 2\na 1 2\nb 1\n", "a word and 2 numbers"),
        (b"1 2\na 1 nan\n", "not finite"),
        (b"1 2\n\xff 1 2\n", "not UTF-8"),
        (b"1 2\na \x00\x00\x00", "the file ends"),
    ],
)
def test_malformed_files_are_refused_by_row(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_vectors(tmp_path / "v"))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        list(read_vectors(tmp_path / "v"))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"2 3\n", b"1 1\n"]))
def test_any_bytes_are_vectors_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes) -> None:
    file = tmp_path_factory.mktemp("v") / "v"
    file.write_bytes(head + data)
    try:
        rows = list(read_vectors(file))
    except InputError:
        return
    buffer = io.BytesIO()
    write_vectors(buffer, {i: f"w{i}" for i in range(len(rows))}, np.stack([numbers for _, numbers in rows]), binary=True)
