"""Renders a chat template, which is code from strangers, within limits. Knows jinja2; knows no ids.

jinja2's immutable sandbox keeps a template from reaching Python. It bounds neither time nor memory, so this adds, by
rewriting the template's syntax tree and by hooks of the sandbox: a deadline that every loop step, call and operator
looks at; a bound on every string and list that is made; an account of all that is made and written. No step of a
template can then cost more than some tens of milliseconds or megabytes. A process of its own with limits of the system
would be simpler to trust, but costs a start of Python before the first word of every chat.

What templates may use besides is what transformers gives them (utils/chat_template_utils.py).
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from llmctl.core.errors import InputError

MAX_SECONDS = 2.0
MAX_CHARS = 10_000_000
"""Of the rendered text, and of any one value on the way."""
_MAX_ITEMS = 1_000_000
_MAX_TOTAL_CHARS = 256_000_000
"""Of all values that a rendering makes, one after the other."""
_MAX_INTEGER_BITS = 4096

_WIDE = re.compile(r"\d{4}|\*")
"""A width in a format string that could make a long text of nothing."""

_STR_METHODS = """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal isdigit isidentifier
    islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
    rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
}
_FILTERS = """
    abs capitalize center count d default dictsort e escape first float format groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title trim truncate unique
    upper urlencode wordcount
"""
_REFUSED = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends, jinja2.nodes.Block)


class _Limit(Exception):
    """A limit was reached."""


class _Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.made_chars = 0
        self.num_written = 0
        self.answers: list[tuple[int, int]] = []

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Limit(f"it runs for more than {MAX_SECONDS:g} s")

    def charge(self, num_chars: int) -> None:
        self.tick()
        self.made_chars += num_chars
        if num_chars > MAX_CHARS:
            raise _Limit(f"it makes a text of more than {MAX_CHARS:,} characters")
        if self.made_chars > _MAX_TOTAL_CHARS:
            raise _Limit(f"it makes more than {_MAX_TOTAL_CHARS:,} characters of text in all")

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
                raise _Limit(f"it makes a value of more than {MAX_CHARS:,} characters")
        return total

    def charge_value(self, value: Any) -> Any:
        """`value`, after its size was put to the account."""
        if isinstance(value, str | list | tuple | dict):
            self.charge(self.weigh(value))
        else:
            self.tick()
        return value


_METER: ContextVar[_Meter] = ContextVar("llmctl_template_meter")


def _meter() -> _Meter:
    """The meter of the rendering under way; a fresh one where jinja2 folds constants while it compiles."""
    return _METER.get(None) or _Meter()


class _Rewriter(jinja2.visitor.NodeTransformer):
    """Puts a guard around every node that makes, repeats or writes something without asking the sandbox."""

    def _guard(self, node: Any, name: str) -> Any:
        return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, _REFUSED):
            tag = type(node).__name__.lower()
            raise jinja2.TemplateSyntaxError(f"{{% {tag} %}} is not allowed in a template", node.lineno)
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: jinja2.nodes.For) -> Any:
        self.generic_visit(node)
        node.iter = self._guard(node.iter, "guard_loop")
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> Any:
        self.generic_visit(node)
        node.nodes = [self._guard(n, "guard_output") for n in node.nodes]
        return node

    def visit_TemplateData(self, node: jinja2.nodes.TemplateData) -> Any:
        return jinja2.nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> Any:
        self.generic_visit(node)
        return self._guard(jinja2.nodes.Tuple(node.nodes, "load", lineno=node.lineno), "guard_concat")

    def visit_List(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._guard(node, "guard_value")

    visit_Dict = visit_List

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> Any:
        self.generic_visit(node)
        return node if node.ctx == "store" else self._guard(node, "guard_value")

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> Any:
        self.generic_visit(node)
        return self._guard(node, "guard_value") if isinstance(node.arg, jinja2.nodes.Slice) else node


@jinja2.pass_context
def _guard_loop(_context: Any, items: Any) -> Iterator[Any]:
    meter = _meter()
    for item in items:
        meter.tick()
        yield item


@jinja2.pass_context
def _guard_output(_context: Any, value: Any) -> str:
    meter = _meter()
    meter.charge(meter.weigh(value))
    return str(value)


@jinja2.pass_context
def _guard_concat(_context: Any, parts: tuple[Any, ...]) -> str:
    meter = _meter()
    meter.charge(sum(meter.weigh(part) for part in parts))
    return "".join(map(str, parts))


@jinja2.pass_context
def _guard_value(_context: Any, value: Any) -> Any:
    return _meter().charge_value(value)


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are put to the account."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        meter = _meter()
        for value in args:
            if isinstance(value, list | tuple | dict):
                meter.weigh(value)
        return meter.charge_value(function(*args, **kwargs))

    return wrapped


def _check_count(value: Any, *, most: int = MAX_CHARS) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise _Limit(f"it asks for something {value:,} long")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and (_WIDE.search(text) or re.search(r":[^}]*\{", text)):
        raise _Limit("it formats a text to a great width")


def _check_printf(text: Any, *values: Any, **named: Any) -> None:
    _check_format(text)
    _check_count(len(str(text)) + str(text).count("%") * _meter().weigh([*values, *named.values()]))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        _check_count(len(text) + (len(text) + 1 if not old else text.count(old)) * len(new))


def _joined(meter: _Meter, separator: Any, items: Any) -> list[Any]:
    parts = _bounded_list(items)
    meter.charge(meter.weigh(parts) + len(parts) * len(str(separator)))
    return parts


def _bounded_list(items: Any) -> list[Any]:
    """`items` as a list, with an eye on the clock and the number."""
    meter = _meter()
    result: list[Any] = []
    for item in items:
        result.append(item)
        if len(result) % 256 == 0:
            meter.tick()
            if len(result) > _MAX_ITEMS:
                raise _Limit(f"it makes a list of more than {_MAX_ITEMS:,} items")
    return result


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    _check_count(indent, most=100)
    _check_count(len(indent) if isinstance(indent, str) else 0, most=100)
    _meter().weigh(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if _WIDE.search(format) or re.search(r"%\d{2}", format):
        raise _Limit("it formats a date to a great width")
    return datetime.now().strftime(format)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's own, so that a field may be called `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says. The places are noted, as transformers' AssistantTracker does."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a set)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        text = caller()
        meter = _meter()
        meter.answers.append((meter.num_written, meter.num_written + len(text)))
        return text


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        tree = super()._parse(source, name, filename)
        return _Rewriter().visit(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        if isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def getattr(self, obj: Any, attribute: str) -> Any:
        # An item of that name wins where the attribute is refused: a message may have a key "count" or "pop".
        if isinstance(obj, Mapping) and attribute in obj and attribute not in _METHODS[dict]:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _meter()
        meter.tick()
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(sequence, str | list | tuple):
                    _check_count(max(0, count) * max(1, meter.weigh(sequence)))
        if isinstance(left, int) and isinstance(right, int):
            _check_integers(operator, left, right)
        if operator == "+" and isinstance(left, str | list | tuple):
            meter.charge(meter.weigh(left) + meter.weigh(right))
        if operator == "%" and isinstance(left, str):
            _check_printf(left, right)
        return super().call_binop(context, operator, left, right)

    # Underscored, so that a template's keyword argument may be called `self`.
    def call(_self, _context: Any, _obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter()
        meter.tick()
        owner = getattr(_obj, "__self__", None)
        if isinstance(owner, str):
            args = _check_method(meter, owner, getattr(_obj, "__name__", ""), args)
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple | dict):
                meter.weigh(value)
        result = super().call(_context, _obj, *args, **kwargs)
        if isinstance(owner, Mapping | list | tuple):  # looks up or views what is there already
            return result
        return meter.charge_value(result)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(text)
            _check_count(len(text) + text.count("{") * _meter().weigh([*args, *kwargs.values()]))
            return str(wrapped(*args, **kwargs))

        return checked


def _check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() + right.bit_length()
    if operator == "**":
        bits = left.bit_length() * max(0, right)
    if operator in ("*", "**") and bits > _MAX_INTEGER_BITS:
        raise _Limit("it makes a number of thousands of digits")


def _check_method(meter: _Meter, owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a method of a string that would make a long text of little; give back its arguments."""
    if name in ("center", "ljust", "rjust", "zfill") and args:
        _check_count(args[0])
    elif name == "expandtabs":
        _check_count((args[0] if args and isinstance(args[0], int) else 8) * max(1, owner.count("\t")))
    elif name == "replace" and len(args) >= 2:
        _check_replace(owner, args[0], args[1])
    elif name == "join" and len(args) == 1:
        return (_joined(meter, owner, args[0]),)
    elif name in ("split", "rsplit", "splitlines") and len(owner) > _MAX_ITEMS:
        meter.charge(MAX_CHARS)
    return args


def _environment(*, strict: bool) -> _Sandbox:
    undefined = jinja2.StrictUndefined if strict else jinja2.Undefined
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], undefined=undefined)
    known = dict(environment.filters)
    filters = {name: _charged(known[name]) for name in _FILTERS.split()}
    filters |= {
        "center": _checking(known["center"], lambda text, width=80: _check_count(width)),
        "format": _checking(known["format"], _check_printf),
        "indent": _checking(known["indent"], _check_indent),
        "replace": _check_replace_filter(known["replace"]),
        "join": _bounded_join(known["join"]),
        "list": _charged(_bounded_list),
        "sum": _charged(_sum),
        "slice": _checking(known["slice"], lambda value, slices, *rest, **_: _check_count(slices, most=10_000)),
        "tojson": _charged(_tojson),
        "guard_loop": _guard_loop,
        "guard_output": _guard_output,
        "guard_concat": _guard_concat,
        "guard_value": _guard_value,
    }
    environment.filters.clear()
    environment.filters.update(filters)
    environment.globals.pop("lipsum", None)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=_Namespace)
    return environment


def _checking(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return _charged(wrapped)


def _check_indent(text: Any, width: Any = 4, *_rest: Any, **_kwargs: Any) -> None:
    length = width if isinstance(width, int) else len(str(width))
    _check_count(length * (str(text).count("\n") + 1) + len(str(text)))


def _check_replace_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(eval_context: Any, text: Any, old: Any, new: Any, count: Any = None) -> Any:
        _check_replace(str(text), old, new)
        return function(eval_context, text, old, new, count)

    return _charged(wrapped)


def _bounded_join(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(eval_context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        return function(eval_context, _joined(_meter(), d, value), d, attribute)

    return _charged(wrapped)


def _sum(items: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Numbers only: adding lists up one by one takes the square of their number."""
    total = start
    for item in _bounded_list(items):
        value = item if attribute is None else (item.get(attribute) if isinstance(item, Mapping) else None)
        if not isinstance(value, int | float):
            raise jinja2.TemplateError("only numbers can be summed up")
        total += value
    return total


class ChatTemplate:
    """A compiled chat template. Raises InputError when `source` is not one, or uses what is refused.

    Other templates from strangers pass the same gate: `what` is how messages call them, `strict` makes a name that is
    not there an error rather than an empty text.
    """

    def __init__(self, source: str, *, what: str = "chat template", strict: bool = False) -> None:
        self._what = what
        try:
            self._template = _environment(strict=strict).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{what}, line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, _Limit, RecursionError, ValueError, OverflowError) as error:
            raise InputError(f"{what}: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, end) of what it marks by `{% generation %}`.

        Raises InputError for what the template itself refuses, and past the limits of time and size.
        """
        meter = _Meter()
        token = _METER.set(meter)
        pieces: list[str] = []
        try:
            meter.charge(meter.weigh(dict(variables)))
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                meter.num_written += len(piece)
                if meter.num_written > MAX_CHARS:
                    raise _Limit(f"it writes more than {MAX_CHARS:,} characters")
        except _Limit as error:
            raise InputError(f"the {self._what} was stopped: {error}") from error
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the {self._what} is unsafe: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(f"the {self._what} refused what it was given: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise InputError(f"the {self._what} was stopped: it calls itself too deeply or makes too much") from error
        finally:
            _METER.reset(token)
        return "".join(pieces), meter.answers
