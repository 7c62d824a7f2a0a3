"""A context that is full: which turns would have to go is said, and nothing goes unless the user says so."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ContextFull
from . import window
from .speaker import Speaker


def with_room(speaker: Speaker, act: Callable[[], object]) -> None:
    """Ask or answer again; where the context is full offer to forget the oldest turns, and try again if that is wanted.

    An answer that filled the context is kept as far as it got.
    """
    while True:
        before = speaker.session.messages
        try:
            act()
            return
        except ContextFull as full:
            wrote = speaker.session.messages != before
            if not make_room(speaker, full, wrote=wrote) or wrote:
                return


def make_room(speaker: Speaker, full: ContextFull, *, wrote: bool) -> bool:
    """Say that the context is full, and drop the oldest turns if the user says so; False if nothing was dropped.

    wrote: the last turn is the one that filled it, so it stays.
    """
    talk, session = speaker.talk, speaker.session
    there = window.turns(session)
    n = window.to_drop(there[:-1] if wrote else there, full.tokens - full.window + 1, full.window)
    talk.say(f"the context is full: {full.tokens} tokens, and it holds {full.window}")
    if wrote:
        talk.say("the answer is kept as far as it got")
    if not n:
        talk.say("forgetting turns would not make room: ask something shorter, or start with a larger -c")
        return False
    talk.say("the oldest turns:")
    for i, one in enumerate(there[:n], 1):
        talk.say(f"  {i}  {one.tokens:>6} tokens  {one.question}")
    freed = sum(one.tokens for one in there[:n])
    what = "this turn" if n == 1 else f"these {n} turns"
    if not talk.yes(f"Forget {what} ({freed} tokens)? Documents stay, and so does what follows."):
        talk.say("nothing was dropped; /drop N forgets the N oldest turns, /clear all of them")
        return False
    session.drop_oldest(n)
    if wrote:
        talk.say("there is room again: ask for the rest, or /regen")
    return True
