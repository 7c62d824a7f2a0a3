"""Markdown for a terminal while it is still being written: what can no longer change, and lines of what can."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ENDS = re.compile(r"[ ]+((?:\x1b\[[0-9;]*m)*)$")  # blanks before the end of a line, which only a copy would show
# a last line of marks alone may become a list, a rule, a table or a heading of what is above it
_MARKS = re.compile(r"(?:^|\n)[ \t]*[-=*_#`~>+|:\d.)\s]*$")


def settled(text: str) -> int:
    """How many characters of `text` no later text can change: all but its last block.

    >>> settled("one\\n\\ntwo"), settled("- a\\n\\n- b"), settled("```\\na\\n\\nb")
    (5, 0, 0)
    """
    starts = [token.map[0] for token in _parsed(text) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return 0
    lines = text.split("\n")
    return sum(len(line) + 1 for line in lines[: starts[-1]])


def presentable(text: str) -> str:
    """`text` without a last line that is too short to say what it is going to be.

    >>> presentable("a word\\n--"), presentable("a word\\n- b")
    ('a word', 'a word\\n- b')
    """
    found = _MARKS.search(text)
    return text[: found.start()] if found else text


def lines(text: str, console: Console, width: int) -> list[str]:
    """`text` as lines of at most `width` columns, with the console's colours.

    Line breaks within a paragraph are kept, HTML is shown as it is written, and links show where they lead.
    """
    from rich.markdown import Heading, Markdown

    class Left(Heading):
        LEVEL_ALIGN = {}  # noqa: RUF012 - rich's own name: no heading in the middle of the screen

    class Ours(Markdown):
        elements = {**Markdown.elements, "heading_open": Left}  # noqa: RUF012

    shown: list[str] = []
    for block in _blocks(_parsed(text)):
        found = Ours("", code_theme="ansi_dark", hyperlinks=False)
        found.parsed = block
        with console.capture() as captured:
            console.print(found, width=width)
        drawn = [_ENDS.sub(r"\1", line) for line in captured.get().split("\n")]
        full = [i for i, line in enumerate(drawn) if _COLOURS.sub("", line).strip()]
        if full:  # blank lines around a block are ours to make
            shown += ["", *drawn[full[0] : full[-1] + 1]] if shown else drawn[full[0] : full[-1] + 1]
    return shown


def _blocks(tokens: list[Any]) -> Iterator[list[Any]]:
    """The tokens of each block that stands in no other."""
    block: list[Any] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _parsed(text: str) -> list[Any]:
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table").parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens
