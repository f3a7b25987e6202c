"""A corpus as text, for training a tokenizer and for counting. Knows sources and documents; knows no ids and no shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from llmctl.core.data.documents import ReadRules, SplitRule, read_pieces
from llmctl.core.data.records import RecordError, read_piece
from llmctl.core.data.sources import Source


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A document or a part of one, as UTF-8. `file_bytes` of its file have been read so far."""

    source: int
    data: bytes
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
            documents, errors = read_piece(piece, field=field, max_line_bytes=max_line_bytes, skip_errors=True)
            yield from errors
            for data in documents:
                yield TextPiece(piece.source, data, piece.starts_document, file_bytes)
