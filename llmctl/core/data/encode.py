"""Pieces of documents to ids: what a worker does, whether in a process of its own or in this one.

Knows the tokenizer, JSON and the split rule; knows no files of the corpus, no shards and no processes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.data.documents import PIECE_BYTES, Piece, SplitRule, last_cut
from llmctl.core.errors import InputError
from llmctl.core.files import parse_json

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

TokenIds = npt.NDArray[np.uint32]

DIGEST_BYTES = 16

# Patterns of pre-tokenisers for which `documents.last_cut` was proven (see its docstring and tests), as tokenizer.json writes them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SAFE_PATTERNS = frozenset(
    {
        _GPT2,
        *(_CONTRACTIONS + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}" + _CL100K_TAIL for digits in (r"\p{N}{1,3}", r"\p{N}")),
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


def may_cut(tokenizer_json: dict[str, Any]) -> bool:
    """Whether a text's ids are those of its pieces joined, when it is cut at the places that `documents.last_cut` finds.

    True for byte-level tokenizers whose pre-tokeniser is known to end a word there. False means "not known".
    """
    normalizer, pre = tokenizer_json.get("normalizer"), tokenizer_json.get("pre_tokenizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    if any(
        token.get("lstrip") or token.get("rstrip") or token.get("single_word") or _spans_line(token.get("content", ""))
        for token in tokenizer_json.get("added_tokens", ())
    ):
        return False
    parts = pre.get("pretokenizers", []) if pre is not None and pre.get("type") == "Sequence" else [pre]
    return _splits_at_lines(parts)


def _spans_line(content: str) -> bool:
    """Whether an added token holds a newline beside something else, which a cut could divide."""
    return "\n" in content and bool(content.strip("\n"))


def _splits_at_lines(parts: list[Any]) -> bool:
    splits = False
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            splits = splits or part.get("use_regex", True)
        elif kind == "Split" and part.get("behavior") == "Isolated" and part.get("pattern", {}).get("Regex") in SAFE_PATTERNS:
            splits = True
        elif kind != "Digits":
            return False
    return splits


@dataclass(frozen=True, kw_only=True)
class EncodeRules:
    """How pieces become ids. `add_bos` None means as the tokenizer does by itself."""

    tokenizer_dir: Path
    field: str
    split: SplitRule
    allow_special: bool
    add_bos: bool | None
    skip_errors: bool


@dataclass(frozen=True)
class Segment:
    """Ids of a piece for one split. `ids` (n,) is None where they were not asked for. `num_bytes` of text."""

    is_val: bool
    ends_document: bool
    num_bytes: int
    ids: TokenIds | None


@dataclass(frozen=True)
class RecordError:
    """Something that could not be read: where, and why."""

    source: int
    line: int
    offset: int
    reason: str


@dataclass(frozen=True)
class EncodedPiece:
    """What became of a piece. At most one segment a split. `digest` (16 bytes) identifies the text, or the error."""

    segments: tuple[Segment, ...]
    errors: tuple[RecordError, ...]
    digest: bytes
    num_special: int = 0
    has_text: bool = False


@dataclass(frozen=True)
class _Part:
    """Text for one split, before it is encoded."""

    is_val: bool
    starts_document: bool
    ends_document: bool
    data: bytes


class PieceEncoder:
    """Encodes pieces by EncodeRules. Raises InputError if the tokenizer has no end-of-text token, or no BOS that is wanted."""

    def __init__(self, rules: EncodeRules, tokenizer: "Tokenizer | None" = None) -> None:
        if tokenizer is None:
            from llmctl.core.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(rules.tokenizer_dir)
        self._rules = rules
        self._tokenizer = tokenizer
        self.may_cut = may_cut(json.loads(tokenizer.to_json()))
        """Whether texts may be cut; see `may_cut`."""
        eos_id, bos_id = tokenizer.eos_id, tokenizer.bos_id
        add_bos = tokenizer.adds_bos if rules.add_bos is None else rules.add_bos
        if eos_id is None:
            raise InputError(
                f"{rules.tokenizer_dir}: the tokenizer names no end-of-text token, and each document ends with one;"
                ' set "eos_token" in its tokenizer_config.json'
            )
        if add_bos and bos_id is None:
            raise InputError(f"{rules.tokenizer_dir}: the tokenizer has no BOS token to begin documents with; leave out --add-bos")
        self._eos = np.array([eos_id], dtype=np.uint32)
        self._bos = np.array([bos_id] if add_bos else [], dtype=np.uint32)

    def encode(self, pieces: Sequence[Piece], *, wants_train: bool = True, wants_val: bool = True) -> list[EncodedPiece]:
        """One result for each piece; the ids of a split that is not wanted are left out."""
        read = [self._read(piece) for piece in pieces]
        wanted = [[self._texts(part.data) if (wants_val if part.is_val else wants_train) else None for part in parts] for parts, _ in read]
        texts = [text for row in wanted for part_texts in row if part_texts is not None for text in part_texts]
        encoded = iter(self._tokenizer.encode_batch(texts, allow_special=self._rules.allow_special, add_bos=False))
        results = []
        for piece, (parts, errors), row in zip(pieces, read, wanted, strict=True):
            segments = []
            for part, part_texts in zip(parts, row, strict=True):
                ids = None if part_texts is None else self._framed(part, [next(encoded) for _ in part_texts])
                segments.append(Segment(part.is_val, part.ends_document, len(part.data), ids))
            results.append(self._result(piece, parts, tuple(errors), tuple(segments)))
        return results

    def _framed(self, part: _Part, chunks: list[list[int]]) -> TokenIds:
        """The ids of a part's cuts, with BOS where the document starts and the end-of-text id where it ends."""
        arrays = [np.array(chunk, dtype=np.uint32) for chunk in chunks]
        return np.concatenate([self._bos[: len(self._bos) * part.starts_document], *arrays, self._eos[: int(part.ends_document)]])

    def _texts(self, data: bytes) -> list[str]:
        """A part's text, in cuts of at most about PIECE_BYTES: `tokenizers` takes some 40 bytes of memory a byte of text."""
        texts = []
        while self.may_cut and len(data) > PIECE_BYTES and (cut := last_cut(data, PIECE_BYTES)):
            texts.append(data[:cut].decode())
            data = data[cut:]
        return [*texts, data.decode()] if data else texts

    def _result(self, piece: Piece, parts: list[_Part], errors: tuple[RecordError, ...], segments: tuple[Segment, ...]) -> EncodedPiece:
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        num_special, has_text = 0, False
        for part in parts:
            digest.update(part.data)
            text = part.data.decode()
            num_special += self._tokenizer.count_special(text)
            has_text = has_text or bool(text.strip())
        digest.update(repr((piece.starts_document, piece.ends_document, [(e.line, e.reason) for e in errors])).encode())
        return EncodedPiece(segments, errors, digest.digest(), num_special, has_text)

    def _read(self, piece: Piece) -> tuple[list[_Part], list[RecordError]]:
        """A piece's text by split, and what was wrong with it."""
        if piece.error is not None:
            error = RecordError(piece.source, piece.line, piece.offset, piece.error)
            ended = [_Part(bool(piece.is_val), False, True, b"")] if not piece.starts_document else []
            return ended, [error]
        if not piece.is_json:
            data, errors = valid_lines(piece, skip_errors=self._rules.skip_errors)
            if errors and not data and piece.starts_document and piece.ends_document:
                return [], errors
            return [_Part(bool(piece.is_val), piece.starts_document, piece.ends_document, data)], errors
        try:
            data = text_of_record(piece.data, self._rules.field)
        except InputError as error:
            return [], [RecordError(piece.source, piece.line, piece.offset, str(error))]
        split = self._rules.split
        if piece.is_val is not None or split.kind != "tail":
            return [_Part(split.holds_out(data) if piece.is_val is None else piece.is_val, True, True, data)], []
        cut = split.head_bytes(data)
        halves = [_Part(False, True, True, data[:cut]), _Part(True, True, True, data[cut:])]
        return [half for half in halves if half.data] or halves[:1], []


def valid_lines(piece: Piece, *, skip_errors: bool) -> tuple[bytes, list[RecordError]]:
    """Text that is UTF-8; the lines that are not are errors, and left out where errors are skipped."""
    try:
        piece.data.decode()
        return piece.data, []
    except UnicodeDecodeError:
        pass
    good, errors, offset = [], [], piece.offset
    for number, line in enumerate(piece.data.split(b"\n")):
        try:
            line.decode()
            good.append(line)
        except UnicodeDecodeError as error:
            reason = f"not valid UTF-8 at byte {error.start} of the line (byte {offset + error.start} of the text)"
            errors.append(RecordError(piece.source, piece.line + number, offset + error.start, reason))
            if not skip_errors:
                break
        offset += len(line) + 1
    return b"\n".join(good), errors


def text_of_record(line: bytes, field: str) -> bytes:
    """The text of a JSON record, as UTF-8. Raises InputError whose message is the reason alone."""
    try:
        record = parse_json(line, where="record")
    except InputError as error:
        raise InputError(str(error).removeprefix("record: ")) from error
    if not isinstance(record, dict):
        raise InputError(f"a JSON object is wanted, {_kind(record)} was found")
    if field not in record:
        raise InputError(f"no field {field!r} (--field); the fields are {', '.join(map(repr, list(record)[:8])) or 'none'}")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"the field {field!r} holds {_kind(text)}, text is wanted")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the field {field!r} holds a lone surrogate at character {error.start}, which is no text") from error


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
