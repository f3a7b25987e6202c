"""A corpus as pieces: blocks of lines that are documents, or UTF-8 text cut where no token crosses. Knows bytes; knows no ids.

Only as much is looked at here as cutting takes, and nothing is done line by line where a block will do: dividing it into
documents, decoding, parsing and encoding are the workers' work (see encode.py). A file may be larger than memory, so it
comes in pieces of about a mebibyte.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np

from llmctl.core.data.cuts import first_cut, last_cut
from llmctl.core.data.sources import OpenSource, Source
from llmctl.core.errors import InputError

PIECE_BYTES = 1 << 20
SPLIT_HASH_BYTES = 1 << 16
"""How much of a document's head decides about its split: all of it would have to be read before its first piece goes out."""

_READ_BYTES = 1 << 20
_LOOKAHEAD_BYTES = 8
"""More than the character after a newline takes."""


Form = Literal["text", "lines", "jsonl"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that was read, by `form`: "text" is a document or a part of one; "lines" and "jsonl" are whole lines,
    each a document or a JSON record if it is not blank (see `lines_of`).

    `is_val` is None where the split is not known yet. `line` (from 1) and `offset` (bytes from 0) say where it stands in
    the decompressed source number `source`. `error` says why there is no data: the piece stands for something that could
    not be read.
    """

    source: int
    line: int
    offset: int
    data: bytes
    form: Form = "text"
    starts_document: bool = True
    ends_document: bool = True
    is_val: bool | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which documents, or which part of each, are held out.

    "hash": a document is held out when a hash of its first 64 KiB of text, keyed by `seed`, falls below `fraction`, so
    the answer depends on the content alone, and equal documents go the same way. "tail": the last `fraction` of the
    text of every document is held out, as a document of its own. "all": everything is, "none": nothing is.
    """

    kind: Literal["hash", "tail", "all", "none"]
    fraction: float = 0.0
    seed: int = 0

    def holds_out(self, text: bytes) -> bool:
        """Whether the document that begins with `text` (UTF-8; 64 KiB of it or all) is held out; for "tail", never as a whole."""
        return self.hold_out([text])[0]

    def hold_out(self, texts: Sequence[bytes]) -> list[bool]:
        """`holds_out` of each; at some ten thousand documents a mebibyte a call for each is felt."""
        limit = math.ceil(self.fraction * 2.0**64)
        if self.kind != "hash" or limit >= 1 << 64:
            return [self.kind != "none" and self.kind != "tail"] * len(texts)
        first_out = limit.to_bytes(8, "big")
        hash_of = functools.partial(hashlib.blake2b, digest_size=8, key=f"llmctl split {self.seed}".encode())
        return [hash_of(text[:SPLIT_HASH_BYTES]).digest() < first_out for text in texts]

    def head_bytes(self, text: bytes) -> int:
        """For "tail": where the tail begins, moved back to the start of a character. As `text[:int(n * 0.9)]` for ASCII."""
        return character_start(text, self.nominal_head(len(text)))

    def nominal_head(self, num_bytes: int) -> int:
        """For "tail": where the tail of a text of `num_bytes` begins, before a look at its characters."""
        return int(num_bytes * (1 - self.fraction))


def character_start(text: bytes, place: int) -> int:
    """`place` in UTF-8 text, moved back to the first byte of a character."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


@dataclass(frozen=True, kw_only=True)
class ReadRules:
    """How sources fall into documents. `separator` is a line that ends a document of format "text"; `may_cut` says that
    the tokenizer gives a text's ids also when the text is cut at the places that `last_cut` finds."""

    split: SplitRule
    separator: str | None = None
    max_line_bytes: int
    may_cut: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, without its newline. `num_bytes` as it stands there; more than len(data) when it was too long to keep."""

    number: int
    offset: int
    data: bytes
    num_bytes: int


def read_pieces(source: Source, number: int, *, rules: ReadRules, stdin: IO[bytes] | None = None) -> Iterator[tuple[Piece, int]]:
    """The pieces of source `number`, each with the bytes of the file taken so far. Raises InputError for a damaged file."""
    with OpenSource(source, stdin) as opened:
        if source.format == "text" and rules.separator is None:
            pieces = _whole_text(opened, number, rules)
        elif source.format in ("lines", "jsonl"):
            pieces = _by_line(opened, number, rules, "jsonl" if source.format == "jsonl" else "lines")
        else:
            pieces = _by_separator(opened, number, rules)
        for piece in pieces:
            yield piece, opened.num_bytes_taken


def too_long(what: str, num_bytes: int, limit: int) -> str:
    """The message about a line or a document of more than `limit` bytes."""
    return f"{what} is {_megabytes(num_bytes)}, the limit is {_megabytes(limit)} (--max-line-bytes)"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.4g} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def _lines(opened: OpenSource, limit: int) -> Iterator[Line]:
    """Lines, with at most `limit` bytes of each in memory: of a longer one only the length is kept."""
    parts: list[bytes] = []
    number, start, held = 1, opened.offset, 0
    while block := opened.read(_READ_BYTES):
        *ends, rest = block.split(b"\n")
        for end in ends:
            held += len(end)
            yield Line(number, start, b"".join((*parts, end)) if held <= limit else b"", held)
            number, start, parts, held = number + 1, start + held + 1, [], 0
        held += len(rest)
        if held <= limit:
            parts.append(rest)
        else:
            parts = []
    if held:
        yield Line(number, start, b"".join(parts) if held <= limit else b"", held)


def _by_line(opened: OpenSource, number: int, rules: ReadRules, form: Form) -> Iterator[Piece]:
    """Whole lines in pieces that end at the last newline in the first PIECE_BYTES; a line longer than that is a piece of
    its own, or an error. So how the blocks fall changes nothing."""
    is_val = {"all": True, "none": False}.get(rules.split.kind)
    held = bytearray()
    line, offset, looked = 1, opened.offset, 0  # no newline in held[:looked]
    for block in itertools.chain(_blocks(opened), [b""]):
        held += block
        while len(held) > PIECE_BYTES or (held and not block):
            if not block and len(held) <= PIECE_BYTES:
                cut = len(held)
            else:
                cut = held.rfind(b"\n", 0, PIECE_BYTES) + 1 or held.find(b"\n", max(looked, PIECE_BYTES)) + 1 or (0 if block else len(held))
            if not cut:
                looked = len(held)
                if looked <= rules.max_line_bytes:
                    break
                num_bytes, rest = _pass_over(held, opened)
                held = bytearray(rest)
            else:
                data = _taken(held, cut)
                num_bytes = cut - data.endswith(b"\n")
                if cut <= PIECE_BYTES or num_bytes <= rules.max_line_bytes:
                    yield Piece(number, line, offset, data, form, is_val=is_val)
                    line, offset, looked = line + _num_newlines(data), offset + cut, 0
                    continue
            error = too_long(f"line {line}", num_bytes, rules.max_line_bytes)
            yield Piece(number, line, offset, b"", form, error=error)
            line, offset, looked = line + 1, offset + num_bytes + 1, 0


def _pass_over(held: bytearray, opened: OpenSource) -> tuple[int, bytes]:
    """The length of the line that begins with `held`, read on and not kept, and what was read after it."""
    num_bytes = len(held)
    for block in _blocks(opened):
        end = block.find(b"\n")
        if end >= 0:
            return num_bytes + end, block[end + 1 :]
        num_bytes += len(block)
    return num_bytes, b""


def _taken(held: bytearray, num_bytes: int) -> bytes:
    """The first `num_bytes` of `held`, removed from it."""
    with memoryview(held) as view:
        data = bytes(view[:num_bytes])
    del held[:num_bytes]
    return data


def _num_newlines(data: bytes) -> int:
    """As `data.count(b"\\n")`, which at a newline every 30 bytes takes eight times as long: it begins its search anew after each."""
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")))


def lines_of(piece: Piece) -> Iterator[Line]:
    """The lines of a piece of form "lines" or "jsonl" that are not blank, without their ends."""
    offset = piece.offset
    for number, line in enumerate(piece.data.split(b"\n"), piece.line):
        data = line.removesuffix(b"\r") if piece.form == "lines" else line
        if data and not data.isspace():
            yield Line(number, offset, data, len(line))
        offset += len(line) + 1


def _by_separator(opened: OpenSource, number: int, rules: ReadRules) -> Iterator[Piece]:
    """Documents end at a line that is the separator; without one ("paragraphs") at a blank line."""
    separator = None if rules.separator is None else rules.separator.encode()
    held: list[Line] = []
    num_bytes = 0

    def finish() -> Iterator[Piece]:
        while held and not held[0].data.strip():
            held.pop(0)
        while held and not held[-1].data.strip():
            held.pop()
        if held:
            data = b"\n".join(line.data for line in held).removesuffix(b"\r")
            yield from _text_document(number, held[0].number, held[0].offset, data, rules)

    skipping = False
    for line in _lines(opened, rules.max_line_bytes):
        bare = line.data.removesuffix(b"\r")
        if line.num_bytes <= rules.max_line_bytes and (not bare.strip() if separator is None else bare == separator):
            if not skipping:
                yield from finish()
            held, num_bytes, skipping = [], 0, False
            continue
        num_bytes += line.num_bytes + 1
        if num_bytes > rules.max_line_bytes + 1 and not skipping:
            what = f"line {line.number}" if line.num_bytes > rules.max_line_bytes else f"the document up to line {line.number}"
            yield Piece(number, line.number, line.offset, b"", error=too_long(what, max(line.num_bytes, num_bytes), rules.max_line_bytes))
            held, skipping = [], True
        if not skipping:
            held.append(line)
    if not skipping:
        yield from finish()


def _text_document(number: int, line: int, offset: int, data: bytes, rules: ReadRules) -> Iterator[Piece]:
    """A document that lies in memory, as one piece, or two where the tail is held out."""
    if rules.split.kind != "tail":
        yield Piece(number, line, offset, data, is_val=rules.split.holds_out(data))
        return
    cut = rules.split.head_bytes(data)
    for start, part, is_val in ((0, data[:cut], False), (cut, data[cut:], True)):
        if part:
            yield Piece(number, line + data.count(b"\n", 0, start), offset + start, part, is_val=is_val)


def _whole_text(opened: OpenSource, number: int, rules: ReadRules) -> Iterator[Piece]:
    """A whole file as one document, in pieces; in two documents where the tail is held out."""
    start = opened.offset
    if rules.split.kind == "tail":
        total = opened.num_text_bytes()
        if total is None:
            data = _read_all(opened, rules.max_line_bytes)
            total, blocks = len(data), iter((data,))
        else:
            blocks = _blocks(opened)
        divided = _Divided(blocks, rules.split.nominal_head(total))
        yield from _cut_up(divided.head(), number, 1, start, rules, is_val=False)
        line, offset = 1 + divided.num_head_lines, start + divided.num_head_bytes
        yield from _cut_up(divided.tail(), number, line, offset, rules, is_val=True)
        return
    head = b""
    while len(head) < SPLIT_HASH_BYTES and (block := opened.read(_READ_BYTES)):
        head += block
    blocks = itertools.chain((head,), _blocks(opened))
    yield from _cut_up(blocks, number, 1, start, rules, is_val=rules.split.holds_out(head))


def _blocks(opened: OpenSource) -> Iterator[bytes]:
    while block := opened.read(_READ_BYTES):
        yield block


class _Divided:
    """A text as two streams of blocks, divided at a place that is moved back to the start of a character. Read the head first."""

    def __init__(self, blocks: Iterator[bytes], place: int) -> None:
        self._blocks = blocks
        self._place = place
        self._rest = b""
        self.num_head_bytes = 0
        self.num_head_lines = 0

    def head(self) -> Iterator[bytes]:
        held = b""
        for block in self._blocks:
            held += block
            end = self._place - self.num_head_bytes
            if end < len(held):
                end = character_start(held, end)
                self._rest = held[end:]
                yield self._counted(held[:end])
                return
            end = max(0, len(held) - 4)  # the character at the place may begin this far before it
            yield self._counted(held[:end])
            held = held[end:]
        yield self._counted(held)

    def tail(self) -> Iterator[bytes]:
        yield self._rest
        yield from self._blocks

    def _counted(self, block: bytes) -> bytes:
        self.num_head_bytes += len(block)
        self.num_head_lines += _num_newlines(block)
        return block


def _read_all(opened: OpenSource, limit: int) -> bytes:
    blocks, held = [], 0
    while block := opened.read(_READ_BYTES):
        blocks.append(block)
        held += len(block)
        if held > limit:
            raise InputError(
                f"{opened.source.name}: more than {_megabytes(limit)} from a pipe, and to hold out the tail of a text its length must be"
                " known; give a file, raise --max-line-bytes, or hold out with --val-by hash or --val-data"
            )
    return b"".join(blocks)


def _cut_up(blocks: Iterator[bytes], number: int, line: int, offset: int, rules: ReadRules, *, is_val: bool) -> Iterator[Piece]:
    """One document from its blocks, in pieces that end where no token crosses: at the last such place in the first
    PIECE_BYTES, else at the first one after. How the blocks fall (a pipe gives small ones) changes nothing."""
    held = bytearray()
    starts, looked = True, PIECE_BYTES  # the first PIECE_BYTES to `looked` hold no place to cut
    limit = rules.max_line_bytes
    for block in blocks:
        held += block
        while rules.may_cut and len(held) >= PIECE_BYTES + _LOOKAHEAD_BYTES:
            cut = last_cut(held, PIECE_BYTES) if looked == PIECE_BYTES else None
            cut = cut or first_cut(held, looked, min(len(held) - _LOOKAHEAD_BYTES, limit))
            if cut is None:
                looked = len(held) - _LOOKAHEAD_BYTES
                break
            data = _taken(held, cut)
            yield Piece(number, line, offset, data, starts_document=starts, ends_document=False, is_val=is_val)
            starts, looked, line, offset = False, PIECE_BYTES, line + _num_newlines(data), offset + len(data)
        if len(held) > limit + _LOOKAHEAD_BYTES:
            error = _cannot_cut(held, blocks, line, limit, may_cut=rules.may_cut)
            yield Piece(number, line, offset, b"", starts_document=starts, is_val=is_val, error=error)
            return
    if held or not starts:
        yield Piece(number, line, offset, bytes(held), starts_document=starts, is_val=is_val)


def _cannot_cut(held: bytearray, blocks: Iterator[bytes], line: int, limit: int, *, may_cut: bool) -> str:
    """Why a text of more than `limit` bytes stays in one piece: a line that is too long, or no place to cut. Reads it to its end."""
    num_bytes = line_bytes = 0
    for block in itertools.chain((bytes(held),), blocks):
        *ends, rest = block.split(b"\n")
        for end in ends:
            line_bytes += len(end)
            if line_bytes > limit:
                return too_long(f"line {line}", line_bytes, limit)
            line, line_bytes = line + 1, 0
        line_bytes += len(rest)
        num_bytes += len(block)
    if line_bytes > limit:
        return too_long(f"line {line}", line_bytes, limit)
    why = "has no place to cut it" if may_cut else "cannot be cut for this tokenizer"
    return too_long(f"a document {why} and", num_bytes, limit)
