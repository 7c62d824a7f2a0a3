"""What chat puts on a screen: Markdown as it streams, without flicker; nothing of a model commands the terminal."""

from __future__ import annotations

import io
import itertools
import os
import random
import time
from collections.abc import Callable

import pytest

pytest.importorskip("rich", reason="the chat extra is not installed")
from rich.console import Console

from mrrope_gguf.chat import answer as answers
from mrrope_gguf.chat import markdown
from mrrope_gguf.chat.answer import Formatted, Plain
from mrrope_gguf.chat.bar import ReadingBar
from mrrope_gguf.chat.neutral import neutral
from mrrope_gguf.chat.region import Region
from tests.screen import Screen

MARKDOWN = """# The sea

A first paragraph with **bold words** and `code`, long enough that it is wrapped on any screen of the width that is
used here, once or twice.
A second line of it.

- one
- two, which is longer than the others and therefore needs more than a single line of this narrow screen to be shown
  - two and a half

- three

1. first
2. second

```python
def f(x):

    return x  # with <tags> & "quotes"
```

| name | tokens |
|------|-------:|
| book | 24000  |
| note | 12     |

> a quotation <b>with html</b>

A link to [a page](http://example.org/x) and the end.
"""


def console(width: int = 60) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor", highlight=False)


def stream(
    text: str, sizes: Callable[[], int], columns: int = 60, rows: int = 24, status: Callable[[], str] = lambda: ""
) -> Screen:
    """The screen after `text` came in pieces, every one of them drawn."""
    screen = Screen(columns, rows)

    class Out(io.StringIO):
        def write(self, data: str) -> int:
            screen.feed(data.replace("\n", "\r\n"))
            return len(data)

    calls = itertools.count()  # two to a piece: each comes a second after the one before, and takes no time to draw
    shown = Formatted(
        Out(), console(), status, size=lambda: os.terminal_size((columns, rows)), clock=lambda: float(next(calls) // 2)
    )
    at = 0
    while at < len(text):
        n = sizes()
        shown.push(text[at : at + n])
        at += n
    shown.end()
    return screen


def plain(lines: list[str]) -> list[str]:
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
@pytest.mark.parametrize("rows", [60, 14])
def test_markdown_in_pieces_is_the_same_on_the_screen(size: int, rows: int) -> None:
    whole = stream(MARKDOWN, lambda: 10**6, rows=200).lines
    found = stream(MARKDOWN, lambda: size, rows=rows).lines
    text = "\n".join(whole)
    assert plain(found) == plain(whole)
    for part in ("The sea", "bold words", "• two", "def f(x):", "24000", "<b>with html</b>", "http://example.org/x"):
        assert part in text
    assert "**" not in text
    assert "# The sea" not in text
    assert "A second line of it." in whole  # a line of its own
    assert max(map(len, whole)) < 60


def test_random_pieces() -> None:
    wanted = plain(stream(MARKDOWN, lambda: 10**6, rows=200).lines)
    for seed in range(8):
        chance = random.Random(seed)
        assert plain(stream(MARKDOWN, lambda chance=chance: chance.randint(1, 30)).lines) == wanted  # type: ignore[misc]


def test_nothing_flickers() -> None:
    """Of plain words only the line they are in is written again: no more than a screen's width for each piece."""
    words = "the sea was calm and the men of the inn ran on in the rain. " * 20
    screen = stream(words, lambda: 4)
    assert screen.overdrawn < len(words) / 4 * 60
    ended = stream("x " * 4000, lambda: 50, rows=10)  # far longer than the screen
    assert sum(line.count("x") for line in ended.lines) == 4000


def test_the_status_stands_below_and_goes() -> None:
    asked = itertools.count()
    screen = stream("one\n\ntwo\n", lambda: 4, status=lambda: f"S = {next(asked)}")
    assert next(asked) > 1
    assert plain(screen.lines) == ["one", "two"]


def test_another_width_begins_again_below() -> None:
    sizes, calls, out = [60, 60, 30, 30, 30], itertools.count(), io.StringIO()
    shown = Formatted(
        out, console(), size=lambda: os.terminal_size((sizes.pop(0), 24)), clock=lambda: float(next(calls) // 2)
    )  # fmt: skip
    for piece in ("some words ", "and more ", "words that come after it"):
        shown.push(piece)
    shown.end()
    assert out.getvalue().count("some words") >= 2


@pytest.mark.parametrize("text", ["", "\n", "   \n\n", "#", "```", "| a |\n|", "***", "-\n-", "1.", "\\"])
def test_anything_ends(text: str) -> None:
    screen = stream(text, lambda: 1)
    assert len(plain(screen.lines)) <= 3


HOSTILE = "a\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b5n\x00\x08\u202egnp\u2066\u200b\r\nb\u2028c\U000e0041"


def test_nothing_of_a_model_commands_the_terminal() -> None:
    shown = neutral(HOSTILE)
    assert not set(shown) & set("\x1b\x07\x9b\x00\x08\r\u202e\u2066\u200b\u2028\U000e0041")
    assert shown.startswith("a\\e]0;title\\x07\\e[2J\\e[31mred\\x9b5n")
    assert "\nb\nc" in shown
    for kept in ("Straße", "שלום", "नमस्ते\u200dक", "👩\u200d🚀", "a\u00a0b", "tab\tline\n"):
        assert neutral(kept) == kept
    assert "".join(map(neutral, HOSTILE)) == shown
    text = "\n".join(stream(HOSTILE, lambda: 1).lines)
    assert "red" in text
    out = io.StringIO()
    Plain(out, safe=True).push(HOSTILE)
    assert out.getvalue() == shown


def test_a_pipe_gets_the_text_as_it_is() -> None:
    out = io.StringIO()
    shown = Plain(out, safe=False)
    for piece in ("one\x1b[m ", "two"):
        shown.push(piece)
    shown.end()
    assert out.getvalue() == "one\x1b[m two\n"


def test_plain_without_a_terminal_or_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert not answers.plain_wanted(Tty())
    assert isinstance(answers.answer(Tty()), Formatted)
    assert isinstance(answers.answer(io.StringIO()), Plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(answers.answer(Tty()), Plain)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert answers.plain_wanted(Tty())


def test_a_region_writes_what_changed() -> None:
    screen, sent = Screen(40, 10), list[str]()

    def write(text: str) -> None:
        sent.append(text)
        screen.feed(text.replace("\n", "\r\n"))

    region = Region(write)
    for lines in (["a"], ["a", "b"], ["a", "c", "d"], ["a", "c"], ["x", "c"], ["x"]):
        sent.clear()
        region.show(lines)
        assert screen.text.split("\n") == lines
        assert len(sent) == 1
    region.show(["x"])
    assert len(sent) == 1
    region.show(["x", "y"])
    region.keep(1)
    region.show(["z"])
    region.finish()
    assert screen.text.split("\n") == ["x", "z"]


def test_settled() -> None:
    text = "one\n\ntwo\n\n```\ncode\n\nmore"
    n = markdown.settled(text)
    assert text[n:] == "```\ncode\n\nmore"


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_learns_that_later_tokens_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds a token are 0.001 + position * 1e-6 here: after half of the way the rest takes more than what was."""
    now, at = [100.0], [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = ReadingBar(lambda: at[0], lambda: "S = 1.33", io.StringIO())
    total = 8192

    def cost(n: int) -> float:
        return 0.001 * n + n * n * 0.5e-6

    with bar:
        for done in range(512, total // 2 + 1, 512):
            at[0] = done
            now[0] = 100 + cost(done)
            bar(done, total)
        left = cost(total) - cost(total // 2)
        line = bar.line(120)
    assert bar._left == pytest.approx(left, rel=0.02)
    assert left > 1.5 * cost(total // 2)
    assert " 50%  4096/8192 tokens" in line
    assert line.endswith("left  S = 1.33")
    assert f"{round(left)} s left" in line
    assert len(bar.line(30)) <= 30
    # the next prompt is estimated from its first chunk on
    with bar:
        at[0] = total + 10
        bar(10, 1000)
        assert bar._left == pytest.approx(990 * (0.001 + (total + 505) * 1e-6), rel=0.05)


def test_the_bar_shows_itself_and_goes() -> None:
    out = _Tty()
    bar = ReadingBar(lambda: 100, out=out)
    with bar:
        bar(100, 1000)
        time.sleep(0.7)
        bar.say("a line that stays")
        time.sleep(0.3)
    screen = Screen(80, 10)
    screen.feed(out.getvalue().replace("\n", "\r\n"))
    assert screen.text == "a line that stays"
    assert "100/1000 tokens" in out.getvalue()
    quick = _Tty()
    with ReadingBar(lambda: 1, out=quick) as bar:
        bar(1, 1)
    assert quick.getvalue() == ""
