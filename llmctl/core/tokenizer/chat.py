"""Messages to ids by a model's chat template. Knows templates and special tokens; knows no model.

Whatever the messages say, control ids stand only where the template put them: a private-use character, the mark, is
put inside every name of a special token that stands in a message, so that the rendered text matches such a name only
where the template wrote it. The text is cut there, the marks are taken out, and what lies between is plain text.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmctl.core.errors import InputError

if TYPE_CHECKING:
    from llmctl.core.tokenizer.skeleton import Skeleton
    from llmctl.core.tokenizer.template import ChatTemplate
    from llmctl.core.tokenizer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
_PRIVATE_USE = range(0xE000, 0xF900)
_ASSISTANT = "assistant"
_PROBE = "llmctl-probe"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages bring their reasoning. Templates read the first, or the second, so both are filled in."""
_MOST_FORMS = 256
"""Orders of roles whose skeletons are kept; conversations of many turns have many."""
_MOST_CHARS = 1 << 20
"""In the texts of a conversation that is put together; a template is run on longer ones, and its limits look after them."""
_NO_TOKEN = -1
"""In place of a control's id: cut the text here, and put nothing."""


@dataclass(frozen=True)
class _Rendered:
    """A rendered chat without marks. `controls` are (start, end, id) of the special tokens that the template wrote.

    `was_marked` says that a message held the name of a special token, so `text` alone does not tell them apart.
    """

    text: str
    controls: list[tuple[int, int, int]]
    answers: list[Span]
    was_marked: bool


class ChatEncoder:
    """The chat side of one tokenizer. Raises InputError when it has no template."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        if tokenizer.chat_template is None:
            raise InputError("this tokenizer has no chat template; give one with --chat-template FILE, or send plain text with --raw")
        from llmctl.core.tokenizer.template import ChatTemplate

        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template
        self._template = ChatTemplate(tokenizer.chat_template)
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """See Tokenizer.render_chat."""
        return self._render(_plain(messages), prompt=add_generation_prompt)[0]

    def encode(self, messages: Messages, *, add_generation_prompt: bool) -> list[int]:
        """See Tokenizer.encode_chat."""
        rendered = self._render_marked(_plain(messages), prompt=add_generation_prompt, with_answers=False)
        if not rendered.was_marked:
            return self._tokenizer.encode(rendered.text, allow_special=True, add_bos=False)
        return [token_id for token_id, _ in self._encode_pieces(rendered)]

    def encode_turns(self, messages: Messages) -> list[tuple[list[int], bool]]:
        """See Tokenizer.encode_chat_turns."""
        plain = _plain(messages)
        rendered = self._put_together(plain) or self._render_marked(plain, prompt=False, with_answers=True)
        tokens = self._encode_with_starts(rendered)
        starts = {start for _, start in tokens}
        cuts = [(first, first, _NO_TOKEN) for first, _ in rendered.answers if first not in starts]
        if cuts:  # a token would span the end of a prompt and its answer's first white space; generate feeds the prompt alone
            tokens = self._encode_pieces(dataclasses.replace(rendered, controls=sorted([*rendered.controls, *cuts])))
        return _segments(tokens, rendered.answers)

    @cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """See Tokenizer.end_of_turn_ids."""
        probe = [{"role": "user", "content": "Hi."}, {"role": _ASSISTANT, "content": _PROBE}]
        try:
            text, _ = self._render(probe, prompt=False)
        except InputError:
            return frozenset()
        tail = text[text.rfind(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
        match = self._tokenizer.special_pattern.match(tail.lstrip())
        return frozenset() if match is None else frozenset((self._tokenizer.special_tokens[match[0]],))

    # rendering

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool, template: "ChatTemplate | None" = None) -> tuple[str, list[Span]]:
        named = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token, "pad_token": self._tokenizer.pad_token}
        variables = {name: token for name, token in named.items() if token is not None}
        template = self._template if template is None else template
        return template.render({**variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt})

    def _render_marked(self, messages: list[dict[str, Any]], *, prompt: bool, with_answers: bool) -> _Rendered:
        marker = _Marker(self._tokenizer, self._source, messages)
        marked = marker.mark(messages)
        text, answers = self._render(marked, prompt=prompt)
        if with_answers and not answers:
            answers = self._answers(marked, text)
        controls = [(m.start(), m.end(), self._tokenizer.special_tokens[m[0]]) for m in self._tokenizer.special_pattern.finditer(text)]
        if not marker.was_used:
            return _Rendered(text, controls, answers, was_marked=False)
        clean, place = marker.unmark(text)
        return _Rendered(
            clean,
            [(place(start), place(end), token_id) for start, end, token_id in controls],
            [(place(start), place(end)) for start, end in answers],
            was_marked=True,
        )

    def _put_together(self, messages: list[dict[str, Any]]) -> _Rendered | None:
        """What `_render_marked` gives with answers, without running the template; None where that is not known to be the same."""
        if any(message.keys() != {"role", "content"} for message in messages):
            return None
        contents = [message["content"] for message in messages]
        if not all(isinstance(text, str) and text and not text.isspace() for text in contents) or sum(map(len, contents)) > _MOST_CHARS:
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            if len(self._skeletons) >= _MOST_FORMS:
                return None
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        if skeleton is None:
            return None
        marker = _Marker(self._tokenizer, self._source, messages)
        for text in contents:
            marker.mark(text)
            if marker.was_used:
                return None
        text, answers = skeleton.filled(contents)
        controls = [(m.start(), m.end(), self._tokenizer.special_tokens[m[0]]) for m in self._tokenizer.special_pattern.finditer(text)]
        return _Rendered(text, controls, answers, was_marked=False)

    @cached_property
    def _watched(self) -> "ChatTemplate | None":
        """The template for runs on stand-ins, or None when it has none."""
        from llmctl.core.tokenizer.skeleton import Inspected, watching_environment
        from llmctl.core.tokenizer.template import ChatTemplate

        try:
            return ChatTemplate(self._source, sandbox=watching_environment())
        except (Inspected, InputError):
            return None

    def _skeleton(self, roles: tuple[str, ...]) -> "Skeleton | None":
        """The skeleton of a form; None when the template looks at texts, or does not show the answers by its prompts."""
        from llmctl.core.tokenizer.skeleton import Inspected, Skeleton, StandIn

        taken = set(self._source).union(*self._tokenizer.special_tokens)
        unused = (chr(code) for code in _PRIVATE_USE if code % 2 == 0 and not {chr(code), chr(code + 1)} & taken)
        free = list(islice(unused, len(roles)))
        if self._watched is None or len(free) < len(roles):
            return None
        messages = [{"role": role, "content": StandIn(char)} for role, char in zip(roles, free, strict=True)]
        try:
            text, _ = self._render(messages, prompt=False, template=self._watched)
            answers: list[Span] = []
            for number, role in enumerate(roles):
                if role != _ASSISTANT:
                    continue
                prompt, _ = self._render(messages[:number], prompt=True, template=self._watched)
                whole = text if number + 1 == len(roles) else self._render(messages[: number + 1], prompt=False, template=self._watched)[0]
                floor = answers[-1][1] if answers else 0
                if len(prompt) < floor or not text.startswith(prompt) or not text.startswith(whole):
                    return None
                ends = [match.end() for match in self._tokenizer.special_pattern.finditer(whole, len(prompt))]
                answers.append((len(prompt), ends[-1] if ends else len(whole)))
                if answers[-1][0] >= answers[-1][1]:
                    return None
        except (Inspected, InputError):
            return None
        return Skeleton.of(text, free, answers)

    def _answers(self, messages: list[dict[str, Any]], text: str) -> list[Span]:
        """Where in `text` the assistant's answers stand, for a template that does not mark them itself.

        An answer begins where the prompt for it ends, and ends with the special token that closes it.
        """
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message.get("role") != _ASSISTANT:
                continue
            floor = spans[-1][1] if spans else 0
            start = self._answer_start(messages[:number], message, text, floor)
            end = self._answer_end(messages[: number + 1], message, text, start, is_last=number + 1 == len(messages))
            if start is None or end is None or not floor <= start < end:
                raise InputError(
                    f"message {number + 1}: the chat template does not show where this answer begins and ends; "
                    "mark answers in the template with {% generation %} ... {% endgeneration %}"
                )
            spans.append((start, end))
        return spans

    def _answer_start(self, before: list[dict[str, Any]], message: dict[str, Any], text: str, floor: int) -> int | None:
        try:
            prompt, _ = self._render(before, prompt=True)
            if len(prompt) >= floor and text.startswith(prompt):
                return len(prompt)
        except InputError:
            pass  # some templates refuse an empty or unfinished chat
        place = text.find(_content(message), floor)
        return place if place >= 0 else None

    def _answer_end(
        self, upto: list[dict[str, Any]], message: dict[str, Any], text: str, start: int | None, *, is_last: bool
    ) -> int | None:
        if start is None:
            return None
        pattern = self._tokenizer.special_pattern
        try:
            whole = text if is_last else self._render(upto, prompt=False)[0]
            if text.startswith(whole):
                ends = [match.end() for match in pattern.finditer(whole, start)]
                return ends[-1] if ends else len(whole)
        except InputError:
            pass
        # An earlier answer is shown otherwise than the last one (its reasoning is left out, say).
        closing = next((m for m in pattern.finditer(text, start) if self._tokenizer.special_tokens[m[0]] in self.end_of_turn_ids), None)
        if closing is not None:
            return closing.end()
        content = _content(message)
        place = text.find(content, start)
        return place + len(content) if place >= 0 else None

    # ids

    def _encode_with_starts(self, rendered: _Rendered) -> list[tuple[int, int]]:
        if rendered.was_marked:
            return self._encode_pieces(rendered)
        ids, offsets = self._tokenizer.encode_with_offsets(rendered.text, allow_special=True)
        return list(zip(ids, _starts(rendered.text, offsets), strict=True))

    def _encode_pieces(self, rendered: _Rendered) -> list[tuple[int, int]]:
        """(id, start of its text) for each token; between the controls everything is plain text."""
        result: list[tuple[int, int]] = []
        text, place = rendered.text, 0
        strip_left = False
        for start, end, token_id in [*rendered.controls, (len(text), len(text), _NO_TOKEN)]:
            piece_start, piece_end = place, start
            if strip_left:
                piece_start = start - len(text[place:start].lstrip())
            if token_id >= 0:
                flags = self._tokenizer.special_flags(text[start:end])
                strip_left = flags.rstrip
                if flags.lstrip:
                    piece_end = piece_start + len(text[piece_start:start].rstrip())
            piece = text[piece_start:piece_end]
            if piece:
                ids, offsets = self._tokenizer.encode_piece(piece, is_first=not result)
                result += zip(ids, (piece_start + s for s in _starts(piece, offsets)), strict=True)
            if token_id >= 0:
                result.append((token_id, start))
            place = end
        return result


class _Marker:
    """Puts the mark into the names of special tokens in messages, and takes it out of the rendered text."""

    def __init__(self, tokenizer: "Tokenizer", source: str, messages: list[dict[str, Any]]) -> None:
        self.was_used = False
        self._pattern = tokenizer.special_pattern
        self._starts, self._ends, self._longest = tokenizer.special_parts
        self._singles = [token for token in tokenizer.special_tokens if len(token) == 1]
        self._texts = _strings(messages)
        self._source = source

    @cached_property
    def _free(self) -> list[str]:
        """The mark, then a stand-in for each special token of a single character: characters that occur nowhere else."""
        used = set(self._source).union(*self._texts)
        free = list(islice((chr(code) for code in _PRIVATE_USE if chr(code) not in used), 1 + len(self._singles)))
        if len(free) <= len(self._singles):
            raise InputError("the messages use every private-use character of Unicode; control tokens cannot be kept apart")
        return free

    def mark(self, value: Any) -> Any:
        """`value` with the mark inside each name, or part at an end that a neighbour could complete, of a special token."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value

    def _mark_text(self, text: str) -> str:
        while match := self._pattern.search(text):
            self.was_used = True
            if len(match[0]) == 1:
                text = text.replace(match[0], self._free[1 + self._singles.index(match[0])])
            else:  # again and again, since names may overlap
                text = text.replace(match[0], match[0][0] + self._free[0] + match[0][1:])
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())
        for length in range(2, min(self._longest, last - first) + 1):
            if text[last - length : last] in self._starts:
                text = text[: last - 1] + self._free[0] + text[last - 1 :]
                self.was_used = True
                break
        for length in range(2, min(self._longest, last - first) + 1):
            if text[first : first + length] in self._ends:
                text = text[: first + 1] + self._free[0] + text[first + 1 :]
                self.was_used = True
                break
        return text

    def unmark(self, text: str) -> tuple[str, Any]:
        """`text` without marks, and a function from places in `text` to places in the result."""
        mark = self._free[0]
        escaped = f"\\u{ord(mark):04x}"  # what a template that writes ASCII JSON makes of it
        if escaped in text:
            text = text.replace(escaped, mark * len(escaped))
        marks = [place for place, char in enumerate(text) if char == mark]

        def place_of(place: int) -> int:
            return place - bisect_left(marks, place)

        clean = text.replace(mark, "")
        for single, stand_in in zip(self._singles, self._free[1:], strict=True):
            clean = clean.replace(stand_in, single)
        return clean, place_of


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """The messages as plain JSON values, without keys that hold null. Raises InputError for anything else."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("a chat needs a list of at least one message")
    result = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number}: an object with role and content is wanted, {type(message).__name__} was found")
        plain = {str(key): _plain_value(item, number) for key, item in message.items() if item is not None}
        reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        result.append(plain)
    return result


def _plain_value(value: Any, number: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item, number) for item in value]
    raise InputError(f"message {number}: {type(value).__name__} is not a value of JSON")


def _segments(tokens: list[tuple[int, int]], answers: list[Span]) -> list[tuple[list[int], bool]]:
    """The ids of `tokens`, (id, start) each, cut where answers begin and end: runs of ids, and whether each is an answer's."""
    marks = bytearray(len(tokens))
    starts = [start for _, start in tokens]
    for first, last in answers:
        begin, end = bisect_left(starts, first), bisect_left(starts, last)
        marks[begin:end] = b"\1" * (end - begin)
    segments: list[tuple[list[int], bool]] = []
    place = 0
    while place < len(tokens):
        end = marks.find(not marks[place], place)
        end = len(tokens) if end < 0 else end
        segments.append(([token_id for token_id, _ in tokens[place:end]], bool(marks[place])))
        place = end
    return segments


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _strings(item)]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _starts(text: str, offsets: Sequence[Span]) -> list[int]:
    """Where each token's text begins. The offsets of a byte-level post-processor leave out leading white space."""
    starts = []
    end_before = 0
    for start, end in offsets:
        if start > end_before and text[end_before:start].isspace():
            start = end_before
        starts.append(start)
        if end > end_before:
            end_before = end
    return starts
