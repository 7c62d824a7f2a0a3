"""Markdown for a terminal while it is still being written: what can no longer change, and lines of what can."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

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

    found = Ours("", code_theme="ansi_dark", hyperlinks=False)
    found.markup, found.parsed = text, _parsed(text)
    with console.capture() as captured:
        console.print(found, width=width, soft_wrap=False)
    return [line.rstrip() for line in captured.get().rstrip("\n").split("\n")]


def _parsed(text: str) -> list[Any]:
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table").parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens
