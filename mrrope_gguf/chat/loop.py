"""A conversation: turns until the user leaves, errors told and survived, a full context never shifted in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..errors import MrropeError
from .commands import Commands
from .prompt import Leave
from .room import with_room
from .speaker import Speaker

_AGAIN = 400  # characters of a question that is offered again after it was stopped


class Asks(Protocol):
    """Where turns come from: prompt.Prompt, or a test. Raises Leave when there are no more."""

    def ask(self, default: str = "") -> str: ...


def converse(speaker: Speaker, commands: Commands, prompt: Asks) -> None:
    """Talk until the prompt or a command raises Leave. What was there is read first."""
    _survive(speaker, lambda: _open(speaker))
    again = ""
    while True:
        try:
            text, again = prompt.ask(again), ""
            if text:
                again = turn(speaker, commands, text)
        except Leave:
            return


def turn(speaker: Speaker, commands: Commands, text: str) -> str:
    """One command or question; returns a question that was stopped before it was read, to be offered again."""
    again = ""

    def run() -> None:
        nonlocal again
        if commands.handle(text):
            return
        asked, before = commands.question(text), len(speaker.session.messages)
        with_room(speaker, lambda: speaker.say(asked))
        if len(speaker.session.messages) > before:
            commands.attached.clear()
        elif len(text) <= _AGAIN:
            again = text
        speaker.tell_window()

    _survive(speaker, run)
    return again


def _open(speaker: Speaker) -> None:
    if speaker.used:
        speaker.read()
        speaker.tell_window()


def _survive(speaker: Speaker, act: Callable[[], object]) -> None:
    """Run something; an error of ours is told, and the conversation goes on."""
    try:
        act()
    except MrropeError as error:
        speaker.stages.tell()
        speaker.talk.error(error)
    except KeyboardInterrupt:
        speaker.talk.say("stopped")
