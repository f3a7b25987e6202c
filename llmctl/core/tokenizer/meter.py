"""How much a template's rendering may take, and the account of what it has taken. Knows numbers and values; knows no jinja2."""

import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

MAX_SECONDS = 2.0
MAX_CHARS = 10_000_000
"""Of the rendered text, and of any one value on the way."""
MAX_ITEMS = 1_000_000
MAX_TOTAL_CHARS = 256_000_000
"""Of all values that a rendering makes, one after the other."""
_MAX_INTEGER_BITS = 4096

WIDE = re.compile(r"\d{4}|\*")
"""A width in a format string that could make a long text of nothing."""


class LimitReached(Exception):
    """A limit was reached."""


class Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.made_chars = 0
        self.num_written = 0
        self.answers: list[tuple[int, int]] = []

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise LimitReached(f"it runs for more than {MAX_SECONDS:g} s")

    def charge(self, num_chars: int) -> None:
        self.tick()
        self.made_chars += num_chars
        if num_chars > MAX_CHARS:
            raise LimitReached(f"it makes a text of more than {MAX_CHARS:,} characters")
        if self.made_chars > MAX_TOTAL_CHARS:
            raise LimitReached(f"it makes more than {MAX_TOTAL_CHARS:,} characters of text in all")

    def weigh(self, value: Any) -> int:
        """The length of `value` written out, roughly and at least; what is shared counts each time."""
        if isinstance(value, str):
            return len(value)
        total = num_steps = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                total += len(item) + 1
            elif isinstance(item, Mapping):
                total += 1
                waiting.extend(item)
                waiting.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                total += 1
                waiting.extend(item)
            else:
                total += 4
            num_steps += 1
            if num_steps % 4096 == 0:
                self.tick()
            if total + len(waiting) > MAX_CHARS:
                raise LimitReached(f"it makes a value of more than {MAX_CHARS:,} characters")
        return total

    def charge_value(self, value: Any) -> Any:
        """`value`, after its size was put to the account."""
        if isinstance(value, str | list | tuple | dict):
            self.charge(self.weigh(value))
        else:
            self.tick()
        return value


METER: ContextVar[Meter] = ContextVar("llmctl_template_meter")


def current_meter() -> Meter:
    """The meter of the rendering under way; a fresh one where jinja2 folds constants while it compiles."""
    return METER.get(None) or Meter()


def bounded_list(items: Any) -> list[Any]:
    """`items` as a list, with an eye on the clock and the number."""
    meter = current_meter()
    result: list[Any] = []
    for item in items:
        result.append(item)
        if len(result) % 256 == 0:
            meter.tick()
            if len(result) > MAX_ITEMS:
                raise LimitReached(f"it makes a list of more than {MAX_ITEMS:,} items")
    return result


def check_count(value: Any, *, most: int = MAX_CHARS) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise LimitReached(f"it asks for something {value:,} long")


def check_format(text: Any) -> None:
    if isinstance(text, str) and (WIDE.search(text) or re.search(r":[^}]*\{", text)):
        raise LimitReached("it formats a text to a great width")


def check_printf(text: Any, *values: Any, **named: Any) -> None:
    check_format(text)
    check_count(len(str(text)) + str(text).count("%") * current_meter().weigh([*values, *named.values()]))


def check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        check_count(len(text) + (len(text) + 1 if not old else text.count(old)) * len(new))


def check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() + right.bit_length()
    if operator == "**":
        bits = left.bit_length() * max(0, right)
    if operator in ("*", "**") and bits > _MAX_INTEGER_BITS:
        raise LimitReached("it makes a number of thousands of digits")
