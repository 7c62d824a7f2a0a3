"""A conversation: turns until the user leaves, errors told and survived, a full context never shifted in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..errors import MrropeError
from .commands import Commands
from .prompt import Leave
from .room import with_room
from .speaker import Speaker


class Asks(Protocol):
    """Where turns come from: prompt.Prompt, or a test. Raises Leave when there are no more."""

    def ask(self) -> str: ...


def converse(speaker: Speaker, commands: Commands, prompt: Asks) -> None:
    """Talk until the prompt or a command raises Leave. What was there is read first."""
    _survive(speaker, lambda: _open(speaker))
    while True:
        try:
            if text := prompt.ask():
                _survive(speaker, lambda text=text: turn(speaker, commands, text))  # type: ignore[misc]
        except Leave:
            return


def turn(speaker: Speaker, commands: Commands, text: str) -> None:
    """One command or question. Raises Leave, and MrropeError for what cannot be done."""
    if commands.handle(text):
        return
    asked, before = commands.question(text), len(speaker.session.messages)
    with_room(speaker, lambda: speaker.say(asked))
    if len(speaker.session.messages) > before:
        commands.attached.clear()
    elif speaker.session.finish_reason == "interrupted":
        return  # it is not all read: how much is has been said, and the meter counts the whole
    speaker.tell_window()


def _open(speaker: Speaker) -> None:
    if speaker.used and speaker.read():
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
