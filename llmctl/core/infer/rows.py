"""The rows of a batch: JSONL lines in, requests' raw material out. Knows JSON and field names; knows no tokenizer."""

import json
import os
import select
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from llmctl.core.config.generate import ROW_PARAMETERS, STRUCTURES
from llmctl.core.errors import InputError
from llmctl.core.files import parse_json
from llmctl.core.infer.constrain import KINDS as CONSTRAINT_KINDS
from llmctl.core.infer.constrain import Constraint
from llmctl.core.infer.logprobs import MAX_LOGPROBS
from llmctl.core.infer.openai_rows import Reply, is_answer, is_request, plain_row

MAX_LINE_BYTES = 64 << 20
RESULT_FIELDS = ("text", "finish", "num_prompt_tokens", "num_new_tokens", "num_cut", "sample", "score", "error", "line")
"""Names that a result row gives meaning to; an input field of that name could not be carried."""

_READ = (
    *("id", "prompt", "messages", "system", "seed", "stop", "max_new_tokens", "max_tokens", "min_new_tokens", "ignore_eos"),
    *("best_of", "logprobs", *STRUCTURES, *ROW_PARAMETERS),
)
_BLOCK_BYTES = 1 << 16
_IDLE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row that is well formed. `None` means that the row does not say."""

    line: int
    id: int | str
    prompt: str | None = None
    messages: list[Any] | None = None
    system: str | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool | None = None
    best_of: int | None = None
    num_logprobs: int | None = None
    constraint: Constraint | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that mean nothing here and are carried to the result."""
    reply: Reply | None = None
    """For a row of an OpenAI batch file: how it is answered."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used: its id if it had a good one, else its line number, and why."""

    line: int
    id: int | str
    error: str
    is_openai: bool = False
    """Whether the id is the custom_id of a row of an OpenAI batch file."""


def id_key(id: int | str) -> str:
    """The id as text that tells 1 from "1"."""
    return json.dumps(id, ensure_ascii=False)


def parse_row(raw: bytes, line: int) -> Row | BadRow:
    """The row that stands in line `line` (from 1). Never raises for what the line holds."""
    id: int | str = line
    is_openai, reply = False, None
    try:
        if len(raw) > MAX_LINE_BYTES:
            raise InputError(f"longer than {MAX_LINE_BYTES:,} bytes, the limit")
        value = parse_json(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, where=f"line {line}")
        if not isinstance(value, dict):
            raise InputError("not a JSON object")
        if is_request(value):
            if isinstance(value.get("custom_id"), str):
                id, is_openai = value["custom_id"], True
            value, reply = plain_row(value)
        given = value.get("id")
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, int | str):
                raise InputError(f"id: {given!r} is neither a string nor a whole number")
            id = given
        return _row(value, line, id, reply)
    except InputError as error:
        place = f"line {line}: "
        return BadRow(line=line, id=id, error=place + str(error).removeprefix(place), is_openai=is_openai)


def parsed_rows(lines: Iterable[bytes | None]) -> Iterator[Row | BadRow | None]:
    """The rows of the lines, empty ones left out; None where a None says that there is no line yet."""
    number = 0
    for raw in lines:
        if raw is None:
            yield None
            continue
        number += 1
        if raw.strip():
            yield parse_row(raw, number)


RowT = TypeVar("RowT")


def sharded(rows: Iterable[RowT | None], shard: tuple[int, int]) -> Iterator[RowT | None]:
    """Of the rows those of shard (i, n), i from 1: the i-th, the (n + i)-th, and so on. None stays where it is."""
    index, count = shard
    number = 0
    for row in rows:
        if row is None:
            yield None
            continue
        number += 1
        if (number - index) % count == 0:
            yield row


def _row(value: dict[str, Any], line: int, id: int | str, reply: Reply | None) -> Row:
    if is_answer(value) or (reply is not None and ("response" in value or "error" in value)):
        raise InputError("the field 'response' has a meaning in results and cannot be carried; rename it")
    for name in RESULT_FIELDS:
        if name in value:
            raise InputError(f"the field {name!r} has a meaning in results and cannot be carried; rename it")
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise InputError("one of prompt and messages is wanted" + (", not both" if prompt is not None else ""))
    for name in ("prompt", "system"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise InputError(f"{name}: a string is wanted")
    if messages is not None and not isinstance(messages, list):
        raise InputError("messages: a list is wanted")
    if messages is not None and value.get("system") is not None:
        raise InputError("system goes with prompt; in messages, put it first with the role system")
    for text in (prompt, value.get("system")):
        if text is not None:
            _check_text(text)
    if value.get("max_tokens") is not None and value.get("max_new_tokens") is not None:
        raise InputError("max_tokens and max_new_tokens are the same; give one")
    return Row(
        line=line,
        id=id,
        prompt=prompt,
        messages=messages,
        system=value.get("system"),
        seed=_whole(value, "seed", least=0, most=2**63 - 1),
        stop=_stops(value.get("stop")),
        max_new_tokens=_whole(value, "max_new_tokens" if value.get("max_new_tokens") is not None else "max_tokens", least=1, most=1 << 31),
        min_new_tokens=_whole(value, "min_new_tokens", least=0, most=1 << 31),
        ignore_eos=_flag(value, "ignore_eos"),
        best_of=_whole(value, "best_of", least=1, most=100_000),
        num_logprobs=_whole(value, "logprobs", least=0, most=MAX_LOGPROBS),
        constraint=_constraint(value),
        sampling={name: value[name] for name in ROW_PARAMETERS if value.get(name) is not None},
        extra=_extra(value),
        reply=reply,
    )


def _extra(value: Mapping[str, Any]) -> dict[str, Any]:
    extra = {name: item for name, item in value.items() if name not in _READ}
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError as error:  # 1e999 is valid JSON, and Python reads it as infinity
        raise InputError("a number is too large to be carried to the result") from error
    return extra


def _check_text(text: str) -> None:
    """JSON's \\ud800 escapes can make text that has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"a lone surrogate at character {error.start} is not text") from error


def _whole(value: Mapping[str, Any], name: str, *, least: int, most: int) -> int | None:
    number = value.get(name)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise InputError(f"{name}: {number!r} is not a whole number from {least} to {most}")
    return number


def _flag(value: Mapping[str, Any], name: str) -> bool | None:
    flag = value.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise InputError(f"{name}: {flag!r} is neither true nor false")
    return flag


def _constraint(value: Mapping[str, Any]) -> Constraint | None:
    given = [kind for kind in CONSTRAINT_KINDS if value.get(kind) is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} does not go with {given[1]}: an answer follows one of them")
    return Constraint.of(given[0], value[given[0]]) if given else None


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError("stop: a string or a list of strings, none empty, is wanted")
    return tuple(stops)


def file_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, each without its newline. Of one beyond the limit only so much is kept that it shows."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        if not line.endswith(b"\n") and len(line) > MAX_LINE_BYTES:
            while (rest := file.readline(_BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
        yield line.rstrip(b"\r\n")


def polled_lines(fd: int) -> Iterator[bytes | None]:
    """The lines of a pipe or terminal as they come; None when there is none yet, so that the caller can do other work.

    A caller that has nothing else to do, as is seen from its coming back at once, waits here for a twentieth of a second.
    """
    parts: list[bytes] = []  # of a line whose end has not come
    num_held, given_at = 0, 0.0
    while True:
        idle = time.monotonic() - given_at < _IDLE_S / 100
        if not select.select([fd], [], [], _IDLE_S if idle else 0)[0]:
            given_at = time.monotonic()
            yield None
            continue
        block = os.read(fd, _BLOCK_BYTES)
        *ends, rest = block.split(b"\n")
        for end in ends:
            line = b"".join([*parts, end])
            parts.clear()
            num_held, given_at = 0, 0.0
            yield line.removesuffix(b"\r")
        if rest and num_held <= MAX_LINE_BYTES:  # beyond the limit the rest is not kept: the line is refused anyway
            parts.append(rest)
            num_held += len(rest)
        if not block:
            if parts:
                yield b"".join(parts)
            return
