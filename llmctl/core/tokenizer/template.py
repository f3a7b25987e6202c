"""Renders a chat template, or any other template from strangers. Knows its messages to people; the limits are sandbox.py's."""

from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.exceptions

from llmctl.core.errors import InputError
from llmctl.core.tokenizer.meter import MAX_CHARS, METER, LimitReached, Meter
from llmctl.core.tokenizer.sandbox import Sandbox, environment


class ChatTemplate:
    """A compiled chat template. Raises InputError when `source` is not one, or uses what is refused.

    Other templates from strangers pass the same gate: `what` is how messages call them, `strict` makes a name that is
    not there an error rather than an empty text. `sandbox` is one of another kind.
    """

    def __init__(self, source: str, *, what: str = "chat template", strict: bool = False, sandbox: Sandbox | None = None) -> None:
        self._what = what
        try:
            self._template = (sandbox or environment(strict=strict)).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{what}, line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, LimitReached, RecursionError, ValueError, OverflowError) as error:
            raise InputError(f"{what}: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, end) of what it marks by `{% generation %}`.

        Raises InputError for what the template itself refuses, and past the limits of time and size.
        """
        meter = Meter()
        token = METER.set(meter)
        pieces: list[str] = []
        try:
            meter.charge(meter.weigh(dict(variables)))
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                meter.num_written += len(piece)
                if meter.num_written > MAX_CHARS:
                    raise LimitReached(f"it writes more than {MAX_CHARS:,} characters")
        except LimitReached as error:
            raise InputError(f"the {self._what} was stopped: {error}") from error
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the {self._what} is unsafe: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(f"the {self._what} refused what it was given: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise InputError(f"the {self._what} was stopped: it calls itself too deeply or makes too much") from error
        finally:
            METER.reset(token)
        return "".join(pieces), meter.answers
