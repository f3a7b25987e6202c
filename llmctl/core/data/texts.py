"""A corpus as text, for training a tokenizer and for counting. Knows sources and documents; knows no ids and no shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from llmctl.core.data.documents import Piece, ReadRules, SplitRule, read_pieces
from llmctl.core.data.encode import RecordError, text_of_record, valid_lines
from llmctl.core.data.sources import Source
from llmctl.core.errors import InputError


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A document or a part of one. `num_bytes` of UTF-8; `file_bytes` of its file have been read so far."""

    source: int
    text: str
    num_bytes: int
    starts_document: bool
    file_bytes: int


def read_texts(
    sources: Sequence[Source], *, field: str, max_line_bytes: int, may_cut: bool = True, stdin: IO[bytes] | None = None
) -> Iterator[TextPiece | RecordError]:
    """The text of `sources` in order, in bounded memory, and what could not be read.

    `may_cut` as in documents.ReadRules. Raises InputError for a damaged file.
    """
    rules = ReadRules(split=SplitRule(kind="none"), max_line_bytes=max_line_bytes, may_cut=may_cut)
    for number, source in enumerate(sources):
        for piece, file_bytes in read_pieces(source, number, rules=rules, stdin=stdin):
            yield from _texts_of(piece, field, file_bytes)


def _texts_of(piece: Piece, field: str, file_bytes: int) -> Iterator[TextPiece | RecordError]:
    if piece.error is not None:
        yield RecordError(piece.source, piece.line, piece.offset, piece.error)
        return
    if piece.is_json:
        try:
            data = text_of_record(piece.data, field)
        except InputError as error:
            yield RecordError(piece.source, piece.line, piece.offset, str(error))
            return
    else:
        data, errors = valid_lines(piece, skip_errors=True)
        yield from errors
        if errors and not data:
            return
    yield TextPiece(piece.source, data.decode(), len(data), piece.starts_document, file_bytes)
