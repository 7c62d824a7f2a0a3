"""What one operation of a chat template may cost: inside a filter or a method no step is counted and no clock is read.

So its operands are looked at first, and SecurityError is raised where it would take more than about a second: for texts
and lists that grow, for lists within lists that share their parts (2^60 items in 60 lines), and for what takes the
product of two lengths. What no chat template uses is not here at all: see FILTERS, TESTS and METHODS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

TEXT = 1 << 26  # characters of a text
ITEMS = 1 << 20  # of a list, with all that lies within it, counted wherever it stands
ROUND = 1 << 17  # items that a filter goes through; range() ends at 100,000
BITS = 1 << 16  # of a whole number
PRODUCT = 1 << 28  # of two lengths
SHORT = 256  # characters of an attribute's path, of what strftime is given
_WIDTH = 4  # digits of a width in a format
_FORMAT = 1 << 16  # characters of a format
NUMERAL = 4096  # characters of a number as text
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_CONTAINERS = (list, tuple, dict, set, frozenset, Namespace, KeysView, ValuesView, ItemsView)
_SPEC = re.compile(r"(?:\([^)]*\))?[-+ #0]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?")
_HELD = re.compile(r"\{[^{}]+\{|\{[^{}]*[0-9]{5}")  # a width that is an argument, or longer than _WIDTH


def too_much(what: str) -> NoReturn:
    raise SecurityError(f"{what} would give something too large, or take too long")


def weigh(*values: Any, indent: int = 0) -> int:
    """Characters that the values have as text, roughly, each part counted wherever it stands.

    indent: blanks before each item, times its depth. SecurityError for more than TEXT, for more than ITEMS parts, and
    for a number of more than BITS.
    """
    text, left = 0, ITEMS
    stack: list[tuple[Any, int]] = [(value, 0) for value in values]
    while stack:
        one, depth = stack.pop()
        text += indent * depth + 2
        if isinstance(one, str):
            text += len(one)
        elif isinstance(one, int):
            bounded(one)
        elif isinstance(one, _CONTAINERS):
            parts = _parts(one)
            left -= len(parts)
            if left >= 0:
                stack.extend((part, depth + 1) for part in parts)
        if left < 0 or text > TEXT:
            too_much("a list or a text")
    return text


def _parts(value: Any) -> Collection[Any]:
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    return [*value.keys(), *value.values()] if isinstance(value, dict) else value


def bounded(*numbers: Any) -> None:
    """SecurityError for a whole number of more than BITS: str() and division take the square of its length."""
    if any(isinstance(number, int) and number.bit_length() > BITS for number in numbers):
        too_much("a number")


def operands(operator: str, left: Any, right: Any) -> None:
    """For `left operator right`, an arithmetic operator."""
    bounded(left, right)
    if operator == "%" and isinstance(left, str):
        percent(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        powers = left.bit_length() * max(right, 0) if operator == "**" else 0
        bits = left.bit_length() + right.bit_length() if operator == "*" else powers
        if bits > BITS:
            too_much(operator)
    elif operator in "+*":
        for many, other in ((left, right), (right, left)):
            if isinstance(many, (str, list, tuple)):
                size = len(other) + len(many) if isinstance(other, (str, list, tuple)) else 0
                size = len(many) * max(other, 0) if operator == "*" and isinstance(other, int) else size
                if size > (TEXT if isinstance(many, str) else ITEMS):
                    too_much(operator)


def comparison(operator: str, left: Any, right: Any) -> None:
    """For `left operator right`, of eq, ne, lt, lteq, gt, gteq, in, notin. Lists are compared part by part."""
    if not isinstance(left, _CONTAINERS):
        return  # compared with one part after another, or with a list as a whole
    weigh(left)
    if isinstance(right, _CONTAINERS):
        weigh(right)


def percent(text: str, given: Any) -> None:
    """For text % given."""
    pieces = text.split("%")[1:] if len(text) <= _FORMAT else too_much("a format")
    for piece in pieces:
        found = _SPEC.match(piece)
        widths = found.groups() if found else ()
        unread = piece.startswith("(") and ")" not in piece
        if unread or any(width and (width == "*" or len(width) > _WIDTH) for width in widths):
            too_much("a format")
    if len(pieces) * (weigh(given) + 10**_WIDTH) > PRODUCT:
        too_much("a format")


def braces(text: str, given: Any) -> None:
    """For text.format(...)."""
    fields = text.count("{") if len(text) <= _FORMAT else too_much("a format")
    if _HELD.search(text) or fields * (weigh(given) + 10**_WIDTH) > PRODUCT:
        too_much("a format")


def listed(value: Any) -> Any:
    """What a filter goes through; a list of it, where it comes one by one. SecurityError for too many items."""
    if isinstance(value, Iterator):
        value = list(islice(value, ROUND + 1))
    if hasattr(value, "__len__") and len(value) > ROUND:
        too_much("a filter")
    return value


def _product(text: str, other: Any) -> None:
    if isinstance(other, str) and len(text) * len(other) > PRODUCT:
        too_much("a search")


def _lines(text: str, *_: Any) -> None:
    if len(text) > ITEMS and sum(map(text.count, _BREAKS)) > ITEMS:
        too_much("splitlines")


def _grown(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    weigh(old, new)
    if len(text) + (text.count(str(old)) if old else len(text) + 1) * len(str(new)) > TEXT:
        too_much("replace")


def _joined(glue: str, parts: Any) -> None:
    if weigh(parts) + len(glue) * (len(parts) if hasattr(parts, "__len__") else 0) > TEXT:
        too_much("join")


def _split(text: str, glue: Any = None, *_: Any) -> None:
    many = len(text) > 2 * ITEMS and len(text.split(None, ITEMS + 1)) if glue is None else text.count(glue or text)
    if many > ITEMS:
        too_much("split")


def _rsplit(text: str, glue: Any = None, *_: Any) -> None:
    _product(text, glue)
    _split(text, glue)


def _stripped(text: str, letters: Any = None) -> None:
    _product(text, letters)


def _wide(text: str, width: Any, *_: Any) -> None:
    if isinstance(width, int) and width > TEXT:
        too_much("a width")


def _nothing(*_: Any) -> None:
    pass


# methods of str, and what is looked at before each: called with the text and the arguments
METHODS: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("lower", "upper", "title", "capitalize", "casefold", "swapcase"), _nothing),
    **dict.fromkeys(("startswith", "endswith", "removeprefix", "removesuffix"), _nothing),
    **dict.fromkeys(("find", "index", "count", "partition", "isascii", "isidentifier", "istitle"), _nothing),
    **dict.fromkeys(("isalpha", "isalnum", "isdecimal", "isdigit", "isnumeric", "islower", "isupper"), _nothing),
    **dict.fromkeys(("isspace", "isprintable"), _nothing),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _stripped),
    **dict.fromkeys(("rfind", "rindex", "rpartition"), lambda text, other="", *_: _product(text, other)),
    **dict.fromkeys(("ljust", "rjust", "center", "zfill"), _wide),
    "split": _split,
    "rsplit": _rsplit,
    "splitlines": _lines,
    "replace": _grown,
    "join": _joined,
    "format": lambda text, *given: braces(text, given),
}
_READ = {
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    str: frozenset(METHODS),
}
_PLAIN = (int, float, bytes, range, set, frozenset, type(None), KeysView, ValuesView, ItemsView)


def attribute(owner: Any, name: str) -> bool:
    """Whether a template may have this attribute of a value of Python's own types."""
    for kind, names in _READ.items():
        if isinstance(owner, kind):
            return name in names
    return not isinstance(owner, _PLAIN)


def method(owner: Any, name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments in order with which to call a method of a value of Python's own types."""
    if not isinstance(owner, str):
        weigh(given, named, owner if isinstance(owner, (list, tuple)) else ())
        return given
    if name not in METHODS:
        too_much(name)
    if name == "join":
        given = tuple(map(listed, given))
    seen = (*given, *named.values()) if name == "format" else given or (named["sep"],) if "sep" in named else given
    METHODS[name](str(owner), *seen)  # of Markup, whose own are slower
    return given
