"""What a chat template writes around the texts of its messages, found once for all conversations of one form.

A form is the order of the roles. A template that writes texts, joins and strips them, and never looks at one writes the
same around any texts; then a conversation is put together without running the template, which is most of the work of
encoding it. That a template does not look is not guessed but seen: it is run on stand-ins for the texts that raise
Inspected at anything else, in a sandbox that looks after what Python's own strings would do behind their back (compare,
format, filters, calls). A template that looks, or has parts whose text is gathered out of sight (macros, set blocks), has no
skeletons and is run each time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2.nodes
import jinja2.visitor

from llmctl.core.tokenizer.meter import current_meter
from llmctl.core.tokenizer.sandbox import Sandbox, environment

Span = tuple[int, int]

_KEPT_METHODS = frozenset(("__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__", "__getattribute__", "__dir__",
                           "__setattr__", "__delattr__", "__doc__", "__len__", "__sizeof__", "__getnewargs__", "__reduce__",
                           "__reduce_ex__", "__getstate__"))  # fmt: skip
_BLIND_FILTERS = frozenset(("trim", "guard_loop", "guard_output", "guard_value", "guard_concat"))
_BLIND_TESTS = frozenset(("defined", "undefined", "string", "none", "mapping", "number", "boolean", "true", "false"))
_LENGTHS = frozenset(("length", "count"))
_GATHERING = (
    jinja2.nodes.Macro,
    jinja2.nodes.CallBlock,
    jinja2.nodes.FilterBlock,
    jinja2.nodes.AssignBlock,
)
"""Nodes that gather their output into an ordinary string, which would no longer know that it holds a stand-in."""


class Inspected(Exception):
    """The template did something with a text that may depend on what it says."""


class StandIn(str):
    """A text that can be written, joined and stripped; of two characters that stand for nothing else, the second is it stripped.

    Its truth is that of a text that is not blank, so a skeleton is for such texts only.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Any) -> "StandIn":
        if not isinstance(other, str):
            raise Inspected
        return StandIn(str.__add__(self, other))

    def __radd__(self, other: Any) -> "StandIn":
        if not isinstance(other, str):
            raise Inspected
        return StandIn("".join((other, self)))

    def strip(self, chars: Any = None, /) -> "StandIn":
        """White space only, and of a whole text only."""
        if chars is not None or str.__len__(self) != 1:
            raise Inspected
        return StandIn(chr(ord(str.__getitem__(self, 0)) | 1))


def _refuse(*_args: Any, **_kwargs: Any) -> Any:
    raise Inspected


for _name in dir(str):
    if callable(getattr(str, _name)) and _name not in _KEPT_METHODS and _name not in vars(StandIn):
        setattr(StandIn, _name, _refuse)


class _Watcher(jinja2.visitor.NodeTransformer):
    """Guards every comparison, and refuses what gathers output out of sight."""

    def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, _GATHERING) or (isinstance(node, jinja2.nodes.For) and node.recursive):
            raise Inspected
        return super().generic_visit(node, *args, **kwargs)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> Any:
        self.generic_visit(node)
        node.expr = _unseen(node.expr)
        for operand in node.ops:
            operand.expr = _unseen(operand.expr)
        return node


def _unseen(node: Any) -> Any:
    return jinja2.nodes.Filter(node, "guard_unseen", [], [], None, None, lineno=node.lineno)


class WatchingSandbox(Sandbox):
    """The sandbox of templates, for a run on stand-ins."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Watcher().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and holds_stand_in((left, right)):
            raise Inspected
        return super().call_binop(context, operator, left, right)

    def call(_self, _context: Any, _obj: Any, *args: Any, **kwargs: Any) -> Any:
        if holds_stand_in((args, kwargs)) or getattr(_obj, "__name__", "") == "_strftime_now":  # the day may change
            raise Inspected
        return super().call(_context, _obj, *args, **kwargs)


def holds_stand_in(value: Any) -> bool:
    """Whether a stand-in is in `value`, at any depth."""
    if isinstance(value, StandIn):
        return True
    if isinstance(value, dict):
        return any(map(holds_stand_in, value.values())) or any(map(holds_stand_in, value))
    return isinstance(value, list | tuple | set | frozenset) and any(map(holds_stand_in, value))


@jinja2.pass_context
def _guard_unseen(_context: Any, value: Any) -> Any:
    if holds_stand_in(value):
        raise Inspected
    return value


@jinja2.pass_context
def _guard_concat(_context: Any, parts: tuple[Any, ...]) -> str:
    meter = current_meter()
    meter.charge(sum(meter.weigh(part) for part in parts))
    joined = "".join(map(str, parts))
    return StandIn(joined) if holds_stand_in(parts) else joined


def watching_environment() -> WatchingSandbox:
    """As sandbox.environment, for a run on stand-ins."""
    made = environment(strict=False, kind=WatchingSandbox)
    filters, tests = dict[str, Any](made.filters), dict[str, Any](made.tests)
    made.filters.update({name: _watched(filters[name], counts=name in _LENGTHS) for name in filters.keys() - _BLIND_FILTERS})
    made.tests.update({name: _watched(tests[name]) for name in tests.keys() - _BLIND_TESTS})
    made.filters.update(guard_unseen=_guard_unseen, guard_concat=_guard_concat)
    assert isinstance(made, WatchingSandbox)
    return made


def _watched(function: Callable[..., Any], *, counts: bool = False) -> Callable[..., Any]:
    """`function` that refuses stand-ins; one that `counts` may be given a list of messages."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = any(isinstance(value, StandIn) for value in args) if counts else holds_stand_in((args, kwargs))
        if found:
            raise Inspected
        return function(*args, **kwargs)

    for name in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, name):
            setattr(wrapped, name, getattr(function, name))
    return wrapped


@dataclass(frozen=True)
class Skeleton:
    """The literal pieces around the texts, which text (its number, and whether stripped) follows each but the last, and the answers.

    `answers` are places in a text in which each message's text is one character long.
    """

    literals: tuple[str, ...]
    texts: tuple[tuple[int, bool], ...]
    answers: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, stand_ins: Sequence[str], answers: Sequence[Span]) -> "Skeleton":
        """From what the template made of `stand_ins`."""
        known = {chr(ord(char) | bit): (number, bool(bit)) for number, char in enumerate(stand_ins) for bit in (0, 1)}
        literals, texts, begin = [], [], 0
        for place, char in enumerate(text):
            if char in known:
                literals.append(text[begin:place])
                texts.append(known[char])
                begin = place + 1
        return cls((*literals, text[begin:]), tuple(texts), tuple(answers))

    def filled(self, contents: Sequence[str]) -> tuple[str, list[Span]]:
        """The text for these contents, none of them blank, and where the answers stand in it."""
        pieces: list[str] = []
        places, shifts, place, grown = [], [0], 0, 0
        for literal, (number, stripped) in zip(self.literals, self.texts, strict=False):
            content = contents[number].strip() if stripped else contents[number]
            pieces += (literal, content)
            place += len(literal) + 1
            grown += len(content) - 1
            places.append(place)
            shifts.append(grown)
        pieces.append(self.literals[-1])

        def moved(end: int) -> int:
            return end + shifts[sum(place <= end for place in places)]

        return "".join(pieces), [(moved(first), moved(last)) for first, last in self.answers]
