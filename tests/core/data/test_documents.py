"""How a corpus falls into documents and pieces, whatever the blocks that a pipe delivers."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.core.data import documents
from llmctl.core.data.cuts import first_cut, last_cut, may_cut
from llmctl.core.data.documents import Piece, ReadRules, SplitRule, lines_of, read_pieces
from llmctl.core.data.sources import Format, Source
from llmctl.core.tokenizer import Tokenizer

from .conftest import all_pre_tokenizers, byte_level, splitting

NOTHING_HELD_OUT = SplitRule(kind="none")


class Dribble(io.RawIOBase):
    """A pipe that delivers `sizes` bytes at a time, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes, self._turn = io.BytesIO(data), sizes, 0

    def read(self, num_bytes: int = -1) -> bytes:
        self._turn += 1
        size = self._sizes[self._turn % len(self._sizes)]
        return self._data.read(size if num_bytes < 0 else min(size, num_bytes))


def pieces_of(data: bytes, format: Format, *, sizes: list[int] | None = None, **rules: Any) -> list[Piece]:
    """The pieces of `data` given on stdin; a piece of lines as a piece for each of them."""
    result = []
    for piece in blocks_of(data, format, sizes=sizes, **rules):
        if piece.form == "text" or piece.error is not None:
            result.append(piece)
        else:
            result += [Piece(piece.source, line.number, line.offset, line.data, piece.form) for line in lines_of(piece)]
    return result


def blocks_of(data: bytes, format: Format, *, sizes: list[int] | None = None, **rules: Any) -> list[Piece]:
    """The pieces of `data` given on stdin."""
    rules = {"split": NOTHING_HELD_OUT, "max_line_bytes": 1 << 20, **rules}
    stdin: Any = Dribble(data, sizes or [1 << 20])
    return [piece for piece, _ in read_pieces(Source("in", None, format, None), 0, rules=ReadRules(**rules), stdin=stdin)]


def documents_of(data: bytes, format: Format, **rules: Any) -> list[bytes]:
    """The documents of `data`, pieces joined."""
    result: list[bytes] = []
    for piece in pieces_of(data, format, **rules):
        assert piece.error is None
        if piece.starts_document:
            result.append(piece.data)
        else:
            result[-1] += piece.data
    return result


def test_the_formats() -> None:
    text = b"\xef\xbb\xbfone\ntwo\n\n \nthree\r\n\r\nfour"
    assert documents_of(text, "text") == [text[3:]]
    assert documents_of(text, "lines") == [b"one", b"two", b"three", b"four"]
    assert documents_of(text, "paragraphs") == [b"one\ntwo", b"three", b"four"]
    assert documents_of(b"a\n<|endoftext|>\nb\n\nc\n<|endoftext|>\n", "text", separator="<|endoftext|>") == [b"a", b"b\n\nc"]
    assert documents_of(b'{"a":1}\n\n{"b":2}', "jsonl") == [b'{"a":1}', b'{"b":2}']
    assert documents_of(b"", "text") == documents_of(b"\n\n", "lines") == documents_of(b"\n \n", "paragraphs") == []


@settings(deadline=None, max_examples=150)
@given(
    words=st.lists(st.sampled_from([b"ab", b"\n", b"\n\n", b"c", b"\xe5\x9c\x8b", b"---", b" ", b"\r\n", b"9" * 30]), max_size=60),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    format=st.sampled_from(["text", "lines", "paragraphs", "jsonl"]),
    separator=st.sampled_from([None, "---"]),
    tail=st.booleans(),
)
def test_how_the_bytes_arrive_changes_nothing(words: list[bytes], sizes: list[int], format: Any, separator: str | None, tail: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 16)
        patch.setattr(documents, "SPLIT_HASH_BYTES", 10)
        split = SplitRule(kind="tail", fraction=0.3) if tail else SplitRule(kind="hash", fraction=0.5)
        rules = {"split": split, "separator": separator if format == "text" else None, "max_line_bytes": 10_000 if tail else 40}
        data = b"".join(words)
        assert blocks_of(data, format, sizes=sizes, **rules) == blocks_of(data, format, **rules)
        whole = pieces_of(data, format, **rules)
        if format == "text" and separator is None and all(p.error is None for p in whole):
            assert b"".join(p.data for p in whole) == data
        for piece in whole:
            if piece.error is None and piece.data:
                assert data.startswith(piece.data.split(b"\n")[0].rstrip(b"\r"), piece.offset), "offset points at it"
                assert piece.line == 1 + data.count(b"\n", 0, piece.offset)


ODD_TEXT = st.text(alphabet=st.sampled_from(list("aZ7é國。，「\n\n\n\n\r \t\u3000\u00a0/.,'!s²\u0301\u200b\U0001f98a#")), max_size=40)


@pytest.fixture(scope="module", params=list(all_pre_tokenizers()))
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(all_pre_tokenizers()[request.param])


def test_a_cut_never_changes_the_ids(kind: Tokenizer) -> None:
    """For every pre-tokeniser that `may_cut` allows: the ids of the two sides, joined, are the ids of the whole."""
    assert may_cut(json.loads(kind.to_json()))
    seen = []

    @settings(deadline=None, max_examples=400, derandomize=True)
    @given(text=ODD_TEXT)
    def check(text: str) -> None:
        data = text.encode()
        ids = kind.encode(text)
        for stop in range(1, len(data) + 1):
            for cut in (last_cut(data, stop), first_cut(data, stop, len(data))):
                if cut:
                    seen.append(cut)
                    assert kind.encode(data[:cut].decode()) + kind.encode(data[cut:].decode()) == ids, (text, cut)

    check()
    assert len(seen) > 200, "the rule finds places at all"


def test_cutting_is_refused_where_it_is_not_known_to_be_right() -> None:
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    def verdict(change: Any) -> bool:
        backend = tokenizers.Tokenizer.from_str(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_json())
        change(backend)
        return may_cut(json.loads(backend.to_str()))

    assert verdict(lambda b: None)
    assert verdict(lambda b: setattr(b, "normalizer", normalizers.NFC()))
    assert verdict(lambda b: b.add_tokens(["\n\n\n"]))
    assert not verdict(lambda b: setattr(b, "normalizer", normalizers.Strip()))
    assert not verdict(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not verdict(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))
    assert not verdict(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace()))
    assert not verdict(lambda b: setattr(b, "pre_tokenizer", splitting(r"\d|\s+")))
    assert not verdict(lambda b: setattr(b, "pre_tokenizer", None))
    assert not verdict(lambda b: b.add_tokens([AddedToken("X", lstrip=True)]))
    assert not verdict(lambda b: b.add_tokens(["a\nb"]))


def test_a_long_line_is_named_with_its_length_and_not_kept() -> None:
    data = b"x\ny\n" + b"z" * 5_000_000 + b"\nlast"
    (error,) = [p for p in pieces_of(data, "lines", max_line_bytes=100_000) if p.error]
    assert error.error == "line 3 is 5 MB, the limit is 0.1 MB (--max-line-bytes)"
    assert (error.line, error.data) == (3, b"")
    assert [p.data for p in pieces_of(data, "lines", max_line_bytes=100_000) if not p.error] == [b"x", b"y", b"last"]
    for format in ("text", "paragraphs"):
        errors = [p.error for p in pieces_of(data, format, max_line_bytes=1_100_000) if p.error]
        assert errors == ["line 3 is 5 MB, the limit is 1.1 MB (--max-line-bytes)"]


def test_the_hash_rule_is_keyed_and_near_its_fraction() -> None:
    texts = [f"document {i}".encode() for i in range(20_000)]
    held = [SplitRule(kind="hash", fraction=0.1, seed=0).holds_out(t) for t in texts]
    assert 0.09 < sum(held) / len(held) < 0.11
    other = [SplitRule(kind="hash", fraction=0.1, seed=1).holds_out(t) for t in texts]
    both = sum(a and b for a, b in zip(held, other, strict=True))
    assert 0.005 < both / len(texts) < 0.016, "another seed holds out other documents, independently"
    more = [SplitRule(kind="hash", fraction=0.2, seed=0).holds_out(t) for t in texts]
    assert all(b for a, b in zip(held, more, strict=True) if a), "a larger fraction keeps what was held out"


def test_the_hash_rule_is_pinned() -> None:
    """Data that was held out must stay held out in every later version."""
    rule = SplitRule(kind="hash", fraction=0.5)
    assert [rule.holds_out(text) for text in (b"", b"a", b"b", "國".encode(), b"x" * 100_000)] == PINNED
    assert rule.holds_out(b"x" * 100_000) == rule.holds_out(b"x" * 65_536)


PINNED = [False, False, True, False, True]


def test_the_tail_is_nanogpts() -> None:
    """`data[:int(n * 0.9)]`, and never inside a character."""
    rule = SplitRule(kind="tail", fraction=0.1)
    text = "".join(chr(97 + i % 26) for i in range(1237))
    assert rule.head_bytes(text.encode()) == int(len(text) * 0.9)
    for n in range(1, 40):
        data = ("國" * n).encode()
        head = rule.head_bytes(data)
        assert data[:head].decode() + data[head:].decode() == "國" * n
    pieces = pieces_of(text.encode(), "text", split=rule)
    assert [(p.data.decode(), p.is_val) for p in pieces] == [(text[: int(1237 * 0.9)], False), (text[int(1237 * 0.9) :], True)]


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="ab國é🦊\n", max_size=60), size=st.integers(1, 9), fraction=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_tail_of_a_file_is_that_of_the_same_text_in_memory(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("tail")
    data = text.encode()
    (folder / "plain").write_bytes(b"\xef\xbb\xbf" + data)
    (folder / "packed").write_bytes(gzip.compress(data))
    rules = ReadRules(split=SplitRule(kind="tail", fraction=fraction), max_line_bytes=1024)
    wanted = [(p.data, p.is_val, p.line) for p in pieces_of(data, "text", split=rules.split)]
    assert b"".join(d for d, is_val, _ in wanted if not is_val) == data[: rules.split.head_bytes(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_READ_BYTES", size)
        for name in ("plain", "packed"):
            path = folder / name
            pieces = read_pieces(Source(name, path, "text", path.stat().st_size), 0, rules=rules)
            assert [(p.data, p.is_val, p.line) for p, _ in pieces] == wanted


def test_a_file_larger_than_a_piece_comes_in_pieces_without_being_held(tmp_path: Path) -> None:
    data = b"".join(b"line %d of a long text\n" % i for i in range(200_000))
    (tmp_path / "long.txt").write_bytes(data)
    source = Source("long.txt", tmp_path / "long.txt", "text", len(data))
    rules = ReadRules(split=NOTHING_HELD_OUT, max_line_bytes=1 << 21)
    pieces = [piece for piece, _ in read_pieces(source, 0, rules=rules)]
    assert b"".join(p.data for p in pieces) == data
    assert [len(p.data) for p in pieces[:-1]] == pytest.approx([1 << 20] * (len(pieces) - 1), abs=100)
    assert [p.starts_document for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.ends_document for p in pieces] == [False] * (len(pieces) - 1) + [True]
