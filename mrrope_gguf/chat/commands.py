"""What begins with a slash in a conversation: commands, each with what it does to the session."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .. import documents
from ..errors import MrropeError, Refused
from ..sessions.sampling import Sampling
from ..text import printable
from . import window
from .plan import TURN
from .prompt import Leave
from .room import with_room
from .target import remembered

if TYPE_CHECKING:
    from ..session import ChatSession
    from .speaker import Speaker

_COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL)
_OTHER_NAMES = {
    "temperature": "temp",
    "n": "n_predict",
    "predict": "n_predict",
    "typical": "typical_p",
    "r": "reverse_prompt",
}
_SHOWN = 60  # characters of a system prompt


@dataclass(frozen=True)
class Command:
    """`usage` as /help shows it; `run` gets what stands behind the name."""

    usage: str
    words: str
    run: Callable[[Commands, str], None]


class Commands:
    """The commands of one conversation. open_session(name): a session of that name on the same model."""

    def __init__(self, speaker: Speaker, facts: list[str], open_session: Callable[[str], ChatSession]) -> None:
        self.speaker, self._facts, self._open = speaker, facts, open_session
        self.attached: list[documents.Document] = []  # /read, given to the model with the next question

    @property
    def session(self) -> ChatSession:
        return self.speaker.session

    def handle(self, text: str) -> bool:
        """Do what a line says if it is a command; False if it is a question. Raises Leave, MrropeError."""
        found = _COMMAND.fullmatch(text)
        if found is None:
            return False
        command = COMMANDS.get(found[1])
        if command is None:
            names = ", ".join(f"/{name}" for name in COMMANDS)
            raise Refused(f"/{found[1]}: there is no such command", why=f"there are {names}", fix="/help explains them")
        command.run(self, (found[2] or "").strip())
        return True

    def question(self, text: str) -> str:
        """A question with the documents that were attached to it before it."""
        parts = [f"# {one.name}\n\n{one.text.strip()}" for one in self.attached]
        return "\n\n".join([*parts, text])

    def say(self, line: str) -> None:
        self.speaker.talk.say(line)

    def help(self, _rest: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self.say(f"  {command.usage:<{width}}  {command.words}")
        self.say(f"  {chr(34) * 3:<{width}}  begins and ends a text of several lines; Alt-Enter adds a line too")
        self.say(f"  {'Ctrl-C':<{width}}  stops reading or writing, what there is stays; twice at the prompt leaves")

    def leave(self, _rest: str) -> None:
        raise Leave

    def clear(self, _rest: str) -> None:
        self.session.clear()
        self.attached.clear()
        self.say("all turns are forgotten, system prompt and documents stay")
        self.speaker.tell_window()

    def regen(self, _rest: str) -> None:
        with_room(self.speaker, self.speaker.regenerate)
        self.speaker.tell_window()

    def undo(self, _rest: str) -> None:
        question = self.session.undo()
        self.say(f"taken back: {printable(question, limit=_SHOWN)}")
        self.speaker.tell_window()

    def drop(self, rest: str) -> None:
        n = 1 if not rest else int(rest) if rest.isascii() and rest.isdigit() else 0
        self.session.drop_oldest(n)
        self.say(f"forgotten: the oldest {'turn' if n == 1 else f'{n} turns'}")
        self.speaker.tell_window()

    def read(self, rest: str) -> None:
        found = documents.read_all(_paths(rest))
        counts = [self.session.count(one.text) for one in found]
        used, size = self.speaker.used + sum(self.session.count(one.text) for one in self.attached), self.session.window
        if used + sum(counts) + TURN > size:
            raise Refused(
                "this does not fit in the context any more",
                why=f"it has {sum(counts)} tokens, and {max(size - used, 0)} of {size} are free",
                fix="/drop or /clear makes room; -c sets a larger context",
            )
        self.attached += found
        for one, n in zip(found, counts, strict=True):
            self.say(f"{one.name}: {n} tokens, given to the model with your next question")
            for note in one.notes:
                self.speaker.talk.note(f"{one.name}: {note}")

    def save(self, rest: str) -> None:
        if rest:
            self.session.keep_as(rest)
        if self.session.save():
            name = self.session.name
            self.say(f"saved{f' as {printable(name)}' if name else ''}: {self.speaker.used} tokens")

    def load(self, rest: str) -> None:
        if not rest:
            raise Refused("/load needs a name", why="none was given", fix="`mrrope sessions list` shows them")
        if rest == self.session.name:
            raise Refused(f"{printable(rest)} is open already", why="this is it", fix="take another name")
        if remembered(rest) is None:
            what = f"there is no session {printable(rest)!r}"
            raise Refused(what, why="nothing is kept under this name", fix="`mrrope sessions list` shows the names")
        other = self._open(rest)
        self.session.close()
        self.speaker.session = other
        self.attached.clear()
        self.say(f"{printable(rest)}: {len(other.messages) // 2} turns")
        if self.speaker.read():
            self.speaker.tell_window()

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self._sampling()
            return
        name = name.lstrip("-").replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        self.session.sampling = self.session.sampling.but(**{name: _value(name, value.strip())})
        self.say(f"{name} = {printable(str(getattr(self.session.sampling, name)))}")

    def show(self, _rest: str) -> None:
        for fact in self._facts:
            self.say(fact)
        session = self.session
        if session.system:
            self.say(f"system: {printable(session.system, limit=_SHOWN)}")
        for name, text in session.documents:
            self.say(f"document: {printable(name) or '(no name)'}, {session.count(text)} tokens")
        for n, turn in enumerate(window.turns(session), 1):
            self.say(f"  {n}  {turn.tokens:>6} tokens  {turn.question}")
        for one in self.attached:
            self.say(f"attached: {one.name}")
        if session.name:
            self.say(f"session: {printable(session.name)}")
        self._sampling()
        self.speaker.tell_window()

    def _sampling(self) -> None:
        sampling = self.session.sampling
        shown = [f"{field.name} = {getattr(sampling, field.name)}" for field in fields(sampling)]
        self.say(f"sampling: {printable(', '.join(shown), limit=1000)}")


COMMANDS = {
    "help": Command("/help", "this", Commands.help),
    "read": Command("/read FILE...", "give the model documents with the next question", Commands.read),
    "regen": Command("/regen", "another answer to the last question", Commands.regen),
    "undo": Command("/undo", "take the last question and its answer back", Commands.undo),
    "drop": Command("/drop [N]", "forget the N oldest turns; what came before them stays read", Commands.drop),
    "clear": Command("/clear", "forget all turns; system prompt and documents stay", Commands.clear),
    "set": Command("/set [NAME VALUE]", "a sampling parameter, such as /set temp 0.2", Commands.set),
    "show": Command("/show", "model, context, turns, session, sampling", Commands.show),
    "save": Command("/save [NAME]", "save now; with a name, keep the conversation under it", Commands.save),
    "load": Command("/load NAME", "go on with another conversation", Commands.load),
    "exit": Command("/exit", "leave; so do Ctrl-D, and Ctrl-C twice", Commands.leave),
}


def _paths(rest: str) -> list[str]:
    """The files of /read: one name as it is if there is such a file, else as a shell would part them."""
    if not rest:
        raise Refused("/read needs a file", why="none was named", fix="/read FILE")
    whole = os.path.expanduser(rest)
    if os.path.exists(whole):
        return [whole]
    try:
        return [os.path.expanduser(word) for word in shlex.split(rest)]
    except ValueError as error:
        raise MrropeError(f"/read {printable(rest)}", why=str(error), fix="close the quotes") from None


def _value(name: str, text: str) -> float | str | tuple[str, ...]:
    if name == "reverse_prompt":
        return (text,) if text else ()
    kind = next((type(field.default) for field in fields(Sampling) if field.name == name), str)
    try:
        return int(text) if kind is int else float(text) if kind is float else text
    except ValueError:
        return text  # sampling says what is wrong with it
