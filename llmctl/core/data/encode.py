"""Pieces of documents to ids: what a worker does, whether in a process of its own or in this one.

Knows the encoder, the split rule and how documents are framed; knows no files of the corpus, no shards and no processes.
Ids of many documents stay in one array from here to the shard: at some thousand documents a megabyte, an object for each
would take longer than its encoding.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.core.data.documents import Piece, SplitRule
from llmctl.core.data.encoders import NameFinder, TextEncoder, open_encoder
from llmctl.core.data.quality import Cleaner, Keys, QualityRules
from llmctl.core.data.records import RecordError, read_piece
from llmctl.core.data.shards import id_dtype
from llmctl.core.errors import InputError
from llmctl.core.tokenizer.fast import Lengths

if TYPE_CHECKING:
    from llmctl.core.tokenizer import Tokenizer

TokenIds = npt.NDArray[Any]
"""uint16 or uint32, as a shard of the vocabulary has them."""

DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class EncodeRules:
    """How pieces become ids. `add_bos` None means as the tokenizer does by itself; `wants_fast` allows gigatoken."""

    field: str
    split: SplitRule
    allow_special: bool
    add_bos: bool | None
    skip_errors: bool
    max_line_bytes: int
    wants_fast: bool = True
    quality: QualityRules = QualityRules()


@dataclass(frozen=True)
class Segment:
    """What a piece holds for one split: its ids (n,), and `ends`, the place after the last id of each document that ends
    in it. `ids` is None where they were not asked for. `num_bytes` of text."""

    is_val: bool
    num_documents: int
    num_bytes: int
    ids: TokenIds | None
    ends: npt.NDArray[np.uint32]
    keys: Keys | None = None
    """(num_documents, k) where duplicates are to be left out; then `sizes` (num_documents,) are the bytes of each document."""
    sizes: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class EncodedPiece:
    """What became of a piece. At most one segment a split. `digest` (16 bytes) identifies what was read."""

    segments: tuple[Segment, ...]
    errors: tuple[RecordError, ...]
    digest: bytes
    num_special: int = 0
    has_text: bool = False
    cleaned: dict[str, int] = field(default_factory=dict)
    """How many documents, or matches, each quality tool changed or left out."""


@dataclass(frozen=True)
class EncoderNote:
    """Which implementation encodes, why not gigatoken, and how much text it has checked so far."""

    name: str
    why: str | None
    num_checked_bytes: int


@dataclass(frozen=True)
class _Part:
    """The documents of a piece for one split, or the one part of a document."""

    is_val: bool
    texts: list[bytes]
    starts: bool = True
    ends: bool = True


class PieceEncoder:
    """Encodes pieces by EncodeRules."""

    def __init__(self, rules: EncodeRules, tokenizer: "Tokenizer") -> None:
        self._rules = rules
        self._vocab_size = tokenizer.vocab_size
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._eos_id, self._bos_id = framing_ids(tokenizer, add_bos=rules.add_bos)
        self._names = NameFinder(tokenizer)
        self._cleaner = Cleaner(rules.quality) if rules.quality.is_on else None
        self._encoder: TextEncoder = open_encoder(tokenizer, allow_special=rules.allow_special, wants_fast=rules.wants_fast)

    @property
    def note(self) -> EncoderNote:
        """Which implementation encodes."""
        return EncoderNote(self._encoder.name, self._encoder.why, self._encoder.num_checked_bytes)

    def encode(self, pieces: Sequence[Piece], *, wants_train: bool = True, wants_val: bool = True) -> list[EncodedPiece]:
        """One result for each piece; the ids of a split that is not wanted are left out.

        Raises UnequalError when gigatoken and `tokenizers` differ on a sample.
        """
        read = [self._read(piece) for piece in pieces]
        texts: list[bytes] = []
        named: list[int] = []
        numbers = []
        for parts, _, _ in read:
            number = 0
            for part in parts:
                found, places = self._names.count(part.texts)
                number += found
                if wants_val if part.is_val else wants_train:
                    named += [len(texts) + place for place in places]
                    texts += part.texts
            numbers.append(number)
        ids, lengths = self._encoder.encode(texts, named=named)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise InputError(f"the tokenizer gave the id {ids.max()}, outside its vocabulary of {self._vocab_size:,}; it is damaged")
        ids, starts = ids.astype(self._dtype), np.concatenate([[0], np.cumsum(lengths)])
        results, place = [], 0
        for piece, (parts, errors, cleaned), num_special in zip(pieces, read, numbers, strict=True):
            segments = []
            for part in parts:
                num_bytes, num_documents = sum(map(len, part.texts)), len(part.texts) * part.ends
                keys, sizes = self._marks(part.texts)
                if wants_val if part.is_val else wants_train:
                    after = place + len(part.texts)
                    framed, ends = self._framed(part, ids[starts[place] : starts[after]], lengths[place:after])
                    segments.append(Segment(part.is_val, num_documents, num_bytes, framed, ends, keys, sizes))
                    place = after
                else:
                    segments.append(Segment(part.is_val, num_documents, num_bytes, None, np.empty(0, dtype=np.uint32), keys, sizes))
            digest = hashlib.sha256(piece.data)  # twice as fast as BLAKE2b where the processor has instructions for it
            digest.update(repr((piece.starts_document, piece.ends_document, [(e.line, e.reason) for e in errors])).encode())
            has_text = any(map(_has_text, itertools.chain.from_iterable(part.texts for part in parts)))
            results.append(EncodedPiece(tuple(segments), tuple(errors), digest.digest()[:DIGEST_BYTES], num_special, has_text, cleaned))
        return results

    def _marks(self, texts: list[bytes]) -> tuple[Keys | None, npt.NDArray[np.uint32] | None]:
        if self._cleaner is None or not self._cleaner.num_keys:
            return None, None
        return self._cleaner.keys_of(texts), np.array([len(text) for text in texts], dtype=np.uint32)

    def _framed(self, part: _Part, ids: TokenIds, lengths: Lengths) -> tuple[TokenIds, npt.NDArray[np.uint32]]:
        """The ids with BOS where a document starts and the end-of-text id where it ends, and the places after those."""
        has_bos = self._bos_id is not None and part.starts
        stops = np.cumsum(lengths + (has_bos + part.ends))
        result = np.full(stops[-1] if len(stops) else 0, self._eos_id, dtype=self._dtype)
        if len(lengths) == 1:
            result[int(has_bos) : int(has_bos) + len(ids)] = ids
        else:
            is_text = np.ones(len(result), dtype=bool)
            if part.ends:
                is_text[stops - 1] = False
            if has_bos:
                is_text[stops - lengths - (1 + part.ends)] = False
            result[is_text] = ids
        if has_bos:
            result[stops - lengths - (1 + part.ends)] = self._bos_id
        return result, (stops if part.ends else stops[:0]).astype(np.uint32)

    def _read(self, piece: Piece) -> tuple[list[_Part], list[RecordError], dict[str, int]]:
        """A piece's text by split, what was wrong with it, and what was done to it."""
        rules = self._rules
        texts, errors = read_piece(piece, field=rules.field, max_line_bytes=rules.max_line_bytes, skip_errors=rules.skip_errors)
        cleaned: Counter[str] = Counter()
        if self._cleaner is not None:
            texts, cleaned = self._cleaner.clean(texts)
        return self._divided(piece, texts), errors, dict(cleaned)

    def _divided(self, piece: Piece, texts: list[bytes]) -> list[_Part]:
        rules = self._rules
        if piece.form == "text":
            if piece.error is not None and not piece.starts_document:
                texts = [b""]  # the document ends here
            return [_Part(bool(piece.is_val), texts, piece.starts_document, piece.ends_document)] if texts else []
        if piece.is_val is not None:
            return [_Part(piece.is_val, texts)] if texts else []
        train: list[bytes] = []
        val: list[bytes] = []
        if rules.split.kind == "tail":
            for text in texts:
                cut = rules.split.head_bytes(text)
                head, tail = text[:cut], text[cut:]
                if head or not tail:
                    train.append(head)
                if tail:
                    val.append(tail)
        else:
            is_held_out = rules.split.hold_out(texts)
            val = list(itertools.compress(texts, is_held_out))
            train = [text for text, is_out in zip(texts, is_held_out, strict=True) if not is_out] if val else texts
        return [_Part(is_val, found) for is_val, found in ((False, train), (True, val)) if found]


def _has_text(text: bytes) -> bool:
    """Whether UTF-8 text is more than white space; mostly its beginning tells."""
    return bool(text[:64].decode(errors="ignore").strip() or text.decode().strip())


def framing_ids(tokenizer: "Tokenizer", *, add_bos: bool | None, where: Path | None = None) -> tuple[int, int | None]:
    """The ids that end and begin documents; messages say `where` the tokenizer lies.

    Raises InputError if it has no end-of-text token, or no BOS that is wanted.
    """
    wants_bos = tokenizer.adds_bos if add_bos is None else add_bos
    if tokenizer.eos_id is None:
        raise InputError(
            f"{where}: the tokenizer names no end-of-text token, and each document ends with one;"
            ' set "eos_token" in its tokenizer_config.json'
        )
    if wants_bos and tokenizer.bos_id is None:
        raise InputError(f"{where}: the tokenizer has no BOS token to begin documents with; leave out --add-bos")
    return tokenizer.eos_id, tokenizer.bos_id if wants_bos else None
