"""The filters and tests that chat templates get: those that templates use, each with a look at what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import _PassArg

from . import chat_costs as costs

Given = tuple[Any, ...]
Named = Mapping[str, Any]
Guard = Callable[[Any, Given, Named], Any]  # a filter's value, arguments, named ones; returns the value to go on with


def _as_text(value: Any, given: Given, named: Named) -> Any:
    costs.weigh(value)
    return value


def _each(value: Any, given: Given, named: Named) -> Any:
    _path(named.get("attribute"))
    return costs.listed(value)


def _each_by(value: Any, given: Given, named: Named) -> Any:
    _path(given[0] if given else None)
    return costs.listed(value)


def _ordered(value: Any, given: Given, named: Named) -> Any:
    for one in (*given, *named.values()):
        _path(one)
    value = costs.listed(value)
    costs.weigh(value)
    return value


def _path(path: Any) -> None:
    if isinstance(path, str) and len(path) > costs.SHORT:
        costs.too_much("an attribute")


def _sum(value: Any, given: Given, named: Named) -> Any:
    for one in (*given, *named.values()):
        _path(one)
        if not isinstance(one, (str, int, float, type(None))):
            costs.too_much("sum")  # of lists: each is copied as often as there are more
    return costs.listed(value)


def _join(value: Any, given: Given, named: Named) -> Any:
    _path(named.get("attribute"))
    _path(given[1] if len(given) > 1 else None)
    value, glue = costs.listed(value), given[0] if given else named.get("d", "")
    costs.METHODS["join"](str(glue), value)
    return value


def _replace(value: Any, given: Given, named: Named) -> Any:
    costs.weigh(value)
    old, new = (*given, named.get("old", ""), named.get("new", ""))[:2] if len(given) != 1 else (given[0], named["new"])
    costs.METHODS["replace"](str(value), old, new)
    return value


def _trim(value: Any, given: Given, named: Named) -> Any:
    costs.weigh(value)
    costs.METHODS["strip"](str(value), given[0] if given else named.get("chars"))
    return value


def _title(value: Any, given: Given, named: Named) -> Any:
    return value if costs.weigh(value) <= costs.ROUND else costs.too_much("title")


def _indent(value: Any, given: Given, named: Named) -> Any:
    costs.weigh(value)
    width = given[0] if given else named.get("width", 4)
    costs.METHODS["splitlines"](str(value))
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    if size * (str(value).count("\n") + 1) > costs.TEXT:
        costs.too_much("indent")
    return value


def _number(value: Any, given: Given, named: Named) -> Any:
    if isinstance(value, str) and len(value) > costs.NUMERAL:
        costs.too_much("a number")
    costs.bounded(value)
    return value


def _round(value: Any, given: Given, named: Named) -> Any:
    costs.bounded(value)
    digits = given[0] if given else named.get("precision", 0)
    return value if isinstance(digits, int) and abs(digits) <= 100 else costs.too_much("round")


def _format(value: Any, given: Given, named: Named) -> Any:
    costs.weigh(value)
    costs.percent(str(value), dict(named) or given)
    return value


def _tojson(value: Any, given: Given, named: Named) -> Any:
    indent = 0
    for one in (*given, *named.values()):
        if isinstance(one, str) or (isinstance(one, int) and not isinstance(one, bool)):
            indent = max(indent, len(one) if isinstance(one, str) else one)
        elif one is not None and not isinstance(one, bool):
            costs.weigh(one)
            if any(len(part) > 16 for part in one if isinstance(part, str)):
                costs.too_much("tojson")
    costs.weigh(value, indent=indent)
    return value


def _nothing(value: Any, given: Given, named: Named) -> Any:
    return value


FILTERS: Mapping[str, Guard] = {
    **dict.fromkeys(("attr", "count", "d", "default", "first", "items", "last", "length"), _nothing),
    **dict.fromkeys(("capitalize", "e", "escape", "lower", "safe", "string", "upper"), _as_text),
    **dict.fromkeys(("list", "map", "reject", "reverse", "select"), _each),
    **dict.fromkeys(("rejectattr", "selectattr"), _each_by),
    **dict.fromkeys(("dictsort", "max", "min", "sort", "unique"), _ordered),
    **dict.fromkeys(("abs", "float", "int"), _number),
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "title": _title,
    "tojson": _tojson,
    "trim": _trim,
}


def _compared(value: Any, given: Given, named: Named) -> Any:
    for one in (*given, *named.values()):
        costs.comparison("eq", value, one)
    return value


def _divided(value: Any, given: Given, named: Named) -> Any:
    costs.bounded(value, *given)
    return value if isinstance(value, (int, float)) else costs.too_much("a division")  # of a text: it is a format


TESTS: Mapping[str, Guard] = {
    **dict.fromkeys(("boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable"), _nothing),
    **dict.fromkeys(("mapping", "none", "number", "sameas", "sequence", "string", "test", "true"), _nothing),
    **dict.fromkeys(("undefined", "escaped"), _nothing),
    **dict.fromkeys(("==", "eq", "equalto", "!=", "ne", "in"), _compared),
    **dict.fromkeys((">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"), _compared),
    **dict.fromkeys(("divisibleby", "even", "odd"), _divided),
    **dict.fromkeys(("lower", "upper"), _as_text),
}


def _left_out(name: str) -> Callable[..., Any]:
    """In place of a function: jinja2 would not compile a template that names one it does not know."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise SecurityError(f"'{name}' is not there for chat templates")

    return refuse


class Guarded(dict[str, Callable[..., Any]]):
    """Filters or tests by name: those with a guard. Whatever is put in is called after `tick()` and its guard."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], guards: Mapping[str, Guard], tick: Any) -> None:
        super().__init__()
        self._guards, self._tick = guards, tick
        for name, function in functions.items():
            self[name] = function if name in guards else _left_out(name)

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        guard, tick = self._guards.get(name, _as_text), self._tick
        passed = 0 if _PassArg.from_obj(function) is None else 1  # jinja's own first argument

        @wraps(function)
        def guarded(*given: Any, **named: Any) -> Any:
            tick()
            value = guard(given[passed], given[passed + 1 :], named)
            return function(*given[:passed], value, *given[passed + 1 :], **named)

        super().__setitem__(name, guarded)
