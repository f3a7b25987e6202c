"""Supervised rows as people bring them: JSONL or a JSON array (also .gz or .zst), chat or instruction form, checked row by row.

Knows files, rows and the rules of a conversation; knows no tokenizer and no template. A row is named by its number: the
line in a JSONL file, the place in a JSON array, both from 1.

The forms, told apart by their keys (the first readable row of a file decides for the file):

    messages            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    conversations       {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}   (ShareGPT)
    instruction         {"instruction": "...", "input": "...", "output": "..."}, `system` and `history` too   (Alpaca, LLaMA-Factory)
    instances           {"instruction": "...", "instances": [{"input": "...", "output": "..."}]}   (Self-Instruct)
    prompt/completion   {"prompt": "...", "completion": "..."}
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmctl.core.data.sources import OpenSource, Source, readable_name
from llmctl.core.errors import InputError, NotFoundError, UsageError
from llmctl.core.files import parse_json

MAX_LINE_BYTES = 64 << 20
MAX_ARRAY_BYTES = 2 << 30
"""A JSON array is parsed whole, at several times its size in memory; JSONL has no such limit."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: role "system", "user" or "assistant", and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that keep the rules of `check_turns`; every assistant turn is an answer to learn."""

    messages: tuple[Message, ...]

    def canonical(self) -> str:
        """A text that two conversations share only if they are equal."""
        return json.dumps([[m.role, m.content] for m in self.messages])


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on; the completion is the answer to learn."""

    prompt: str
    completion: str

    def canonical(self) -> str:
        """A text that two completions share only if they are equal."""
        return json.dumps([self.prompt, self.completion])

    def as_conversation(self) -> Conversation:
        """The prompt as the user's turn, the completion as the assistant's."""
        return Conversation((Message("user", self.prompt), Message("assistant", self.completion)))


Example = Conversation | Completion


@dataclass(frozen=True)
class Row:
    """A good row: what it teaches (several examples only in the `instances` form)."""

    file: Path
    number: int
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class BadRow:
    """A row that breaks a rule; `rule` says what was found and what is wanted."""

    file: Path
    number: int
    rule: str

    def __str__(self) -> str:
        return f"{self.file}: row {self.number}: {self.rule}"


class _RuleBroken(Exception):
    """Carries the rule that a row breaks, within this file."""


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """The rows of one file, in order; blank lines of a JSONL file are skipped and counted in the numbering.

    Raises NotFoundError for a missing file, InputError for a file that cannot be read at all: UTF-16, a cut or damaged archive, a line
    over MAX_LINE_BYTES, an array file that is not JSON.
    """
    form: _Form | None = None
    for number, value in _raw_rows(path):
        try:
            if isinstance(value, _RuleBroken):
                raise value
            if not isinstance(value, dict):
                raise _RuleBroken(f"a JSON object is wanted, {_kind(value)} was found")
            if form is None:
                form = _detect(value)
            yield Row(path, number, form.parse(value))
        except _RuleBroken as broken:
            yield BadRow(path, number, str(broken))


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number, parsed value or _RuleBroken)."""
    if not path.exists():
        raise NotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the files in it")
    with OpenSource(Source(readable_name(path), path, "jsonl", None)) as opened, io.BufferedReader(_Reader(opened), 1 << 18) as file:
        yield from _array_rows(path, file) if _first_character(file) == b"[" else _line_rows(path, file)


class _Reader(io.RawIOBase):
    """An OpenSource, which gives blocks of a length of its own, as a raw file."""

    def __init__(self, opened: OpenSource) -> None:
        self._opened = opened
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._left:
            self._left = memoryview(self._opened.read(len(buffer)))
        block = self._left[: len(buffer)]
        self._left = self._left[len(block) :]
        buffer[: len(block)] = block
        return len(block)


def _first_character(file: "io.BufferedReader[Any]") -> bytes:
    """The first byte that is not white space, without consuming more than a peek; b"" if it is not near."""
    return file.peek(1).lstrip()[:1]


def _array_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise InputError(f"{path}: a JSON array of more than {MAX_ARRAY_BYTES >> 30} GB; make it JSONL, one row a line")
    yield from enumerate(parse_json(data, where=str(path)), start=1)


def _line_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{path}: row {number} is longer than {MAX_LINE_BYTES >> 20} MB; split it or take it out")
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, where="the line")
        except InputError as error:
            yield number, _RuleBroken(str(error))


# --- forms


@dataclass(frozen=True)
class _Form:
    """How rows of one form are told and read."""

    name: str
    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], tuple[Example, ...]]


def _detect(row: Mapping[str, Any]) -> _Form:
    for form in _FORMS:
        if all(key in row for key in form.keys):
            return form
    known = "; ".join(" + ".join(form.keys) for form in _FORMS)
    raise _RuleBroken(f"its keys are {', '.join(map(repr, list(row)[:8])) or 'none'}; the forms known have: {known}")


def _parse_messages(row: Mapping[str, Any]) -> tuple[Example, ...]:
    turns = []
    for place, item in enumerate(_list_of_objects(row, "messages"), start=1):
        role = item.get("role")
        if role not in _ROLES:
            raise _RuleBroken(f"message {place} has the role {role!r}; {', '.join(_ROLES)} are the roles known")
        if item.get("tool_calls"):
            raise _RuleBroken(f"message {place} has tool calls, which finetune does not know yet")
        turns.append(Message(role, _text(item, "content", f"message {place}")))
    return (_conversation(turns),)


def _parse_conversations(row: Mapping[str, Any]) -> tuple[Example, ...]:
    if "chosen" in row and "rejected" in row:
        raise _RuleBroken("`chosen` and `rejected` make it preference data; supervised rows hold the answer in `conversations`")
    turns = []
    if row.get("system"):
        turns.append(Message("system", _text(row, "system", "the row")))
    for place, item in enumerate(_list_of_objects(row, "conversations"), start=1):
        sender = item.get("from")
        if sender not in _SHAREGPT_ROLES:
            raise _RuleBroken(f"message {place} is from {sender!r}; {', '.join(_SHAREGPT_ROLES)} are known")
        turns.append(Message(_SHAREGPT_ROLES[sender], _text(item, "value", f"message {place}")))
    return (_conversation(turns),)


def _parse_instruction(row: Mapping[str, Any]) -> tuple[Example, ...]:
    turns = []
    if row.get("system"):
        turns.append(Message("system", _text(row, "system", "the row")))
    for place, pair in enumerate(row.get("history") or (), start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _RuleBroken(f"`history` item {place}: a list of two strings, question and answer, is wanted")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = _with_input(_text(row, "instruction", "the row"), row)
    return (_conversation([*turns, Message("user", question), Message("assistant", _text(row, "output", "the row"))]),)


def _parse_instances(row: Mapping[str, Any]) -> tuple[Example, ...]:
    instruction = _text(row, "instruction", "the row")
    examples = []
    for place, item in enumerate(_list_of_objects(row, "instances"), start=1):
        answer = Message("assistant", _text(item, "output", f"instance {place}"))
        examples.append(_conversation([Message("user", _with_input(instruction, item)), answer]))
    return tuple(examples)


def _parse_completion(row: Mapping[str, Any]) -> tuple[Example, ...]:
    completion = _text(row, "completion", "the row")
    if not completion:
        raise _RuleBroken("`completion` is empty, so there is nothing to learn")
    return (Completion(_text(row, "prompt", "the row"), completion),)


_FORMS = (
    _Form("messages", ("messages",), _parse_messages),
    _Form("conversations", ("conversations",), _parse_conversations),
    _Form("instances", ("instruction", "instances"), _parse_instances),
    _Form("instruction", ("instruction", "output"), _parse_instruction),
    _Form("prompt/completion", ("prompt", "completion"), _parse_completion),
)


def _with_input(instruction: str, row: Mapping[str, Any]) -> str:
    """The instruction and, on the next line, its input if there is one, as LLaMA-Factory joins them."""
    extra = row.get("input")
    if extra is None or extra == "":
        return instruction
    return f"{instruction}\n{_text(row, 'input', 'the row')}"


def _conversation(turns: list[Message]) -> Conversation:
    check_turns(turns)
    return Conversation(tuple(turns))


def check_turns(turns: list[Message]) -> None:
    """The rules: a system message only at the start; then user and assistant in turn, a user first, an assistant last."""
    wanted = "user"
    for place, turn in enumerate(turns, start=1):
        if turn.role == "system":
            if place > 1:
                raise _RuleBroken(f"message {place} is a system message; only the first may be")
            continue
        if turn.role != wanted:
            again = place > 1 and turns[place - 2].role == turn.role
            found = f"two {turn.role} messages in a row" if again else "an assistant message"
            raise _RuleBroken(f"message {place}: {found}; user and assistant must take turns, a user first")
        if turn.role == "assistant" and not turn.content:
            raise _RuleBroken(f"message {place}: the assistant's content is empty, so there is nothing to learn")
        wanted = "assistant" if turn.role == "user" else "user"
    if not turns or turns[-1].role != "assistant":
        raise _RuleBroken("the last message is not the assistant's, so its answer is missing" if turns else "it has no messages")


def _list_of_objects(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    if key not in row:
        raise _RuleBroken(f"it has no `{key}`, which the first row of this file has")
    value = row[key]
    if not isinstance(value, list) or not value:
        raise _RuleBroken(f"`{key}` is {_kind(value)}; a list of messages that is not empty is wanted")
    for place, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise _RuleBroken(f"`{key}` item {place} is {_kind(item)}; an object is wanted")
    return value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise _RuleBroken(f"{where} has no `{key}`")
    value = row[key]
    if not isinstance(value, str):
        raise _RuleBroken(f"{where}: `{key}` is {_kind(value)}; text is wanted")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RuleBroken(f"{where}: `{key}` holds half a surrogate pair at character {error.start}, which is no text") from error
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = names.get(type(value), type(value).__name__)
    return f"an empty {name.removeprefix('a ').removeprefix('an ')}" if value in ([], {}) else name
