"""The filters and functions that templates may use, each within the limits of meter.py. Knows jinja2's filters by name."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.utils

from llmctl.core.tokenizer.meter import (
    WIDE,
    LimitReached,
    Meter,
    bounded_list,
    check_count,
    check_printf,
    check_replace,
    current_meter,
)

_FILTERS = """
    abs capitalize center count d default dictsort e escape first float format groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title trim truncate unique
    upper urlencode wordcount
"""


def allowed_filters(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Of jinja2's own filters `known` those that are allowed, guarded, and those that transformers adds."""
    return {
        **{name: charged(known[name]) for name in _FILTERS.split()},
        "center": _checking(known["center"], lambda text, width=80: check_count(width)),
        "format": _checking(known["format"], check_printf),
        "indent": _checking(known["indent"], _check_indent),
        "replace": _check_replace_filter(known["replace"]),
        "join": _bounded_join(known["join"]),
        "list": charged(bounded_list),
        "sum": charged(_sum),
        "slice": _checking(known["slice"], lambda value, slices, *rest, **_: check_count(slices, most=10_000)),
        "tojson": charged(_tojson),
    }


def allowed_functions() -> dict[str, Any]:
    """The globals that transformers gives templates beside jinja2's."""
    return {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _make_dict, "namespace": _Namespace}


def charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are put to the account."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        for value in args:
            if isinstance(value, list | tuple | dict):
                meter.weigh(value)
        return meter.charge_value(function(*args, **kwargs))

    return wrapped


def _checking(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return charged(wrapped)


def joined(meter: Meter, separator: Any, items: Any) -> list[Any]:
    parts = bounded_list(items)
    meter.charge(meter.weigh(parts) + len(parts) * len(str(separator)))
    return parts


def _check_indent(text: Any, width: Any = 4, *_rest: Any, **_kwargs: Any) -> None:
    length = width if isinstance(width, int) else len(str(width))
    check_count(length * (str(text).count("\n") + 1) + len(str(text)))


def _check_replace_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(eval_context: Any, text: Any, old: Any, new: Any, count: Any = None) -> Any:
        check_replace(str(text), old, new)
        return function(eval_context, text, old, new, count)

    return charged(wrapped)


def _bounded_join(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(eval_context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        return function(eval_context, joined(current_meter(), d, value), d, attribute)

    return charged(wrapped)


def _sum(items: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Numbers only: adding lists up one by one takes the square of their number."""
    total = start
    for item in bounded_list(items):
        value = item if attribute is None else (item.get(attribute) if isinstance(item, Mapping) else None)
        if not isinstance(value, int | float):
            raise jinja2.TemplateError("only numbers can be summed up")
        total += value
    return total


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    check_count(indent, most=100)
    check_count(len(indent) if isinstance(indent, str) else 0, most=100)
    current_meter().weigh(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if WIDE.search(format) or re.search(r"%\d{2}", format):
        raise LimitReached("it formats a date to a great width")
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


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
