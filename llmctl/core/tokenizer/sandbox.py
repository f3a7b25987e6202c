"""A jinja2 environment for templates from strangers, with limits. Knows jinja2; knows no chat and no ids.

jinja2's immutable sandbox keeps a template from reaching Python. It bounds neither time nor memory, so this adds, by
rewriting the template's syntax tree and by hooks of the sandbox: a deadline that every loop step, call and operator
looks at; a bound on every string and list that is made; an account of all that is made and written. No step of a
template can then cost more than some tens of milliseconds or megabytes. A process of its own with limits of the system
would be simpler to trust, but costs a start of Python before the first word of every chat.

What templates may use besides is what transformers gives them (utils/chat_template_utils.py).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from llmctl.core.tokenizer.meter import (
    MAX_CHARS,
    MAX_ITEMS,
    Meter,
    check_count,
    check_format,
    check_integers,
    check_printf,
    check_replace,
    current_meter,
)
from llmctl.core.tokenizer.template_filters import allowed_filters, allowed_functions, joined

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
_REFUSED = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends, jinja2.nodes.Block)


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
    meter = current_meter()
    for item in items:
        meter.tick()
        yield item


@jinja2.pass_context
def _guard_output(_context: Any, value: Any) -> str:
    meter = current_meter()
    meter.charge(meter.weigh(value))
    return str(value)


@jinja2.pass_context
def _guard_concat(_context: Any, parts: tuple[Any, ...]) -> str:
    meter = current_meter()
    meter.charge(sum(meter.weigh(part) for part in parts))
    return "".join(map(str, parts))


@jinja2.pass_context
def _guard_value(_context: Any, value: Any) -> Any:
    return current_meter().charge_value(value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says. The places are noted, as transformers' AssistantTracker does."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a set)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        text = caller()
        meter = current_meter()
        meter.answers.append((meter.num_written, meter.num_written + len(text)))
        return text


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with allow-lists and an eye on the meter."""

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
        meter = current_meter()
        meter.tick()
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(sequence, str | list | tuple):
                    check_count(max(0, count) * max(1, meter.weigh(sequence)))
        if isinstance(left, int) and isinstance(right, int):
            check_integers(operator, left, right)
        if operator == "+" and isinstance(left, str | list | tuple):
            meter.charge(meter.weigh(left) + meter.weigh(right))
        if operator == "%" and isinstance(left, str):
            check_printf(left, right)
        return super().call_binop(context, operator, left, right)

    # Underscored, so that a template's keyword argument may be called `self`.
    def call(_self, _context: Any, _obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
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
            check_format(text)
            check_count(len(text) + text.count("{") * current_meter().weigh([*args, *kwargs.values()]))
            return str(wrapped(*args, **kwargs))

        return checked


def _check_method(meter: Meter, owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a method of a string that would make a long text of little; give back its arguments."""
    if name in ("center", "ljust", "rjust", "zfill") and args:
        check_count(args[0])
    elif name == "expandtabs":
        check_count((args[0] if args and isinstance(args[0], int) else 8) * max(1, owner.count("\t")))
    elif name == "replace" and len(args) >= 2:
        check_replace(owner, args[0], args[1])
    elif name == "join" and len(args) == 1:
        return (joined(meter, owner, args[0]),)
    elif name in ("split", "rsplit", "splitlines") and len(owner) > MAX_ITEMS:
        meter.charge(MAX_CHARS)
    return args


def environment(*, strict: bool, kind: type[Sandbox] = Sandbox) -> Sandbox:
    """An environment for one template. `strict` makes a name that is not there an error rather than an empty text."""
    undefined = jinja2.StrictUndefined if strict else jinja2.Undefined
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], undefined=undefined)
    allowed = allowed_filters(dict(made.filters))
    made.filters.clear()
    made.filters.update(allowed, guard_loop=_guard_loop, guard_output=_guard_output, guard_concat=_guard_concat, guard_value=_guard_value)
    made.globals.pop("lipsum", None)
    made.globals.update(allowed_functions())
    return made
