"""How full the context is, for people, and which turns would have to go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..text import printable

if TYPE_CHECKING:
    from ..session import ChatSession

WARN = 0.8  # share of the context from which on a warning is due
_WIDTH = 16  # of the bar
_LEAST_ROOM = 64  # tokens that an answer should have room for


@dataclass(frozen=True)
class Turn:
    """A question and its answer, how many tokens both take, and how the question begins."""

    tokens: int
    question: str


def meter(used: int, window: int, scale: float, full: float = 1.0) -> str:
    """One line: how much of the context is used, and S in effect where the model is extended (`full`: to S = full).

    >>> meter(3412, 16384, 1.58, 2.0)
    '[###             ]  3412 of 16384 tokens, 21 %, S = 1.58 of 2'
    >>> meter(100, 2048, 1.0)
    '[#               ]  100 of 2048 tokens, 5 %'
    """
    share = min(used / window, 1.0) if window else 1.0
    bar = f"[{'#' * round(share * _WIDTH):<{_WIDTH}}]"
    text = f"{bar}  {used} of {window} tokens, {share:.0%}".replace("%", " %")
    return text + (f", S = {scale:.3g} of {full:.3g}" if full > 1 else "")


def warning(used: int, window: int) -> str:
    """What to say of a context that is nearly full; empty while it is not.

    >>> warning(700, 1000)
    ''
    """
    if used < WARN * window:
        return ""
    return (
        f"{used / window:.0%} of the context is used, {max(window - used, 0)} tokens are left; /drop N makes room by "
        "forgetting the N oldest turns, -c sets a larger context"
    ).replace("%", " %", 1)


def turns(session: ChatSession) -> list[Turn]:
    """All turns, the oldest first."""
    messages = session.messages
    return [
        Turn(session.count(asked["content"]) + session.count(said["content"]), printable(asked["content"], limit=40))
        for asked, said in zip(messages[::2], messages[1::2], strict=True)
    ]


def to_drop(there: Sequence[Turn], over: int, window: int) -> int:
    """How many of the oldest turns make room for `over` tokens and some for an answer; 0 if all are not enough.

    >>> to_drop([Turn(100, ""), Turn(300, ""), Turn(20, "")], 50, 4096)
    2
    """
    needed = over + max(_LEAST_ROOM, window // 32)
    freed = 0
    for n, turn in enumerate(there, 1):
        freed += turn.tokens
        if freed >= needed:
            return n
    return len(there) if freed > over else 0
