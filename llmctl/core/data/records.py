"""Pieces to the text of documents: UTF-8 checked, JSON parsed. Knows no tokenizer, no split and no shards."""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llmctl.core.data.documents import Piece, lines_of, too_long
from llmctl.core.errors import InputError
from llmctl.core.files import parse_json

_KEY = re.compile(rb'"[ \t\r\n]*:')
_BETWEEN = secrets.randbits(62)
"""Stands between the records of a block that is parsed at once; no input can hold it but by chance."""


@dataclass(frozen=True)
class RecordError:
    """Something that could not be read: where, and why."""

    source: int
    line: int
    offset: int
    reason: str


def _quick_parser() -> Callable[[bytes], Any] | None:
    try:
        from orjson import loads
    except ImportError:
        return None
    return loads


_quick_json = _quick_parser()


def read_piece(piece: Piece, *, field: str, max_line_bytes: int, skip_errors: bool) -> tuple[list[bytes], list[RecordError]]:
    """The documents of a piece as UTF-8 (of a piece of form "text": its one part), and what was wrong with it.

    After the first error the rest of the piece is left out, unless errors are skipped.
    """
    if piece.error is not None:
        return [], [RecordError(piece.source, piece.line, piece.offset, piece.error)]
    if piece.form == "text":
        data, errors = valid_lines(piece, skip_errors=skip_errors)
        return [] if errors and not data and piece.starts_document and piece.ends_document else [data], errors
    lines = piece.data.split(b"\n")
    if piece.form == "lines" and len(max(lines, key=len)) <= max_line_bytes and b"\r" not in piece.data and is_utf8(piece.data):
        return [line for line in lines if line and not line.isspace()], []
    if piece.form == "jsonl" and (texts := _texts_at_once(lines, field, max_line_bytes)) is not None:
        return texts, []
    documents, found = [], []
    for line in lines_of(piece):
        try:
            if line.num_bytes > max_line_bytes:
                raise InputError(too_long(f"line {line.number}", line.num_bytes, max_line_bytes))
            documents.append(line_text(line.data) if piece.form == "lines" else text_of_record(line.data, field))
        except _BadLineError as error:
            reason = f"not valid UTF-8 at byte {error.start} of the line (byte {line.offset + error.start} of the text)"
            found.append(RecordError(piece.source, line.number, line.offset + error.start, reason))
        except InputError as error:
            found.append(RecordError(piece.source, line.number, line.offset, str(error)))
        if found and not skip_errors:
            break
    return documents, found


class _BadLineError(Exception):
    def __init__(self, start: int) -> None:
        self.start = start


def line_text(line: bytes) -> bytes:
    """`line` itself, if it is UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise _BadLineError(error.start) from error
    return line


def is_utf8(data: bytes) -> bool:
    """Whether `data` is UTF-8."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def valid_lines(piece: Piece, *, skip_errors: bool) -> tuple[bytes, list[RecordError]]:
    """Text that is UTF-8; the lines that are not are errors, and left out where errors are skipped."""
    if is_utf8(piece.data):
        return piece.data, []
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
        record = _parsed(line)
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


def _texts_at_once(lines: list[bytes], field: str, max_line_bytes: int) -> list[bytes] | None:
    """The texts of a block of records, parsed as one array; None where something is amiss, which line by line will tell.

    A number that no input knows stands between the records: were a bracket open at the end of a line, it would not be found
    at every second place. So what is accepted here is a record on each line. About equal keys see _parsed.
    """
    records_in = [line for line in lines if line and not line.isspace()]
    if _quick_json is None or not records_in or len(max(lines, key=len)) > max_line_bytes:
        return None
    try:
        found = _quick_json(b"[" + (b",%d," % _BETWEEN).join(records_in) + b"]")
    except ValueError:
        return None
    records, between = found[::2], found[1::2]
    if len(records) != len(records_in) or between != [_BETWEEN] * (len(records) - 1) or set(map(type, records)) != {dict}:
        return None
    try:
        texts = [record[field] for record in records]
        if set(map(type, texts)) != {str}:
            return None
        is_flat = {dict, list}.isdisjoint(map(type, chain.from_iterable(map(dict.values, records))))
        num_keys = list(map(len if is_flat else _num_keys, records))
        if len(_KEY.findall(b"\n".join(records_in))) != sum(num_keys):  # code has quotes and colons too
            for number, (line, wanted) in enumerate(zip(records_in, num_keys, strict=True)):
                if len(_KEY.findall(line)) != wanted:
                    texts[number] = parse_json(line, where="record")[field]
        return list(map(str.encode, texts))
    except (KeyError, UnicodeEncodeError, InputError):
        return None


def _parsed(line: bytes) -> Any:
    """`line` as strict JSON.

    orjson keeps the last of two equal keys without a word. Each key leaves a quote and a colon in the line, so where
    those are as many as the record has keys, none was equal to another; any other line, and any that orjson refuses,
    goes to the strict parser.
    """
    if _quick_json is not None:
        try:
            record = _quick_json(line)
        except ValueError:
            pass
        else:
            if isinstance(record, dict) and len(_KEY.findall(line)) == _num_keys(record):
                return record
    return parse_json(line, where="record")


def _num_keys(record: dict[str, Any]) -> int:
    """The keys of a record and of all that is nested in it."""
    number = 0
    waiting: list[Any] = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            number += len(value)
            value = value.values()
        waiting.extend(item for item in value if isinstance(item, dict | list))
    return number


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
