"""One turn of a conversation on the screen: the prompt being read, the answer as it comes, how full the context is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..progress import clock
from ..watch import StageChange
from .answer import answer
from .bar import ReadingBar
from .echo import no_echo
from .interrupt import Interrupt
from .talk import Talk
from .window import meter, warning

if TYPE_CHECKING:
    from llama_cpp import Llama

    from ..session import ChatSession
    from ..sessions.reader import Stop

_LONG, _MANY = 2.0, 64  # seconds of reading, and tokens, from which on it is worth a line


class Stages:
    """Tells when the table of an elastic context moved: at once while a prompt is read, else after the answer."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._waiting: list[StageChange] = []
        self.bar: ReadingBar | None = None  # what is on the screen now

    def __call__(self, change: StageChange) -> None:
        if self.bar:
            self.bar.say(_moved(change))
        else:
            self._waiting.append(change)

    def tell(self) -> None:
        """Say what had to wait."""
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            self._say(_moved(change))


class Speaker:
    """A session, its model and the terminal. `session` may be exchanged for another one on the same model."""

    def __init__(self, llm: Llama, talk: Talk, stages: Stages, full_scale: float) -> None:
        self.llm, self.talk, self.stages = llm, talk, stages
        self.session: ChatSession
        self.full_scale = full_scale
        self.interrupt = Interrupt()
        self.bar = ReadingBar(lambda: int(llm.n_tokens), self._scale_words, stopping=self.interrupt.pressed)
        self._warned = False

    @property
    def used(self) -> int:
        """Tokens of the conversation so far."""
        return self.session.tokens_used

    def read(self) -> bool:
        """Read the documents, or what a session held, before anything is asked; False if Ctrl-C ended it."""
        with self.interrupt, no_echo():
            self._begin()
            try:
                done = self.session.read(stop=self.interrupt.wanted)
            finally:
                self._end_reading()
        self.tell_reading(done)
        return done

    def say(self, text: str) -> bool:
        """Ask, and show the answer; False if Ctrl-C ended it. Raises as ChatSession.say does."""
        return self._show(lambda stop: self.session.say(text, stop=stop))

    def regenerate(self) -> bool:
        """Another answer to the last question. Raises as ChatSession.regenerate does."""
        return self._show(lambda stop: self.session.regenerate(stop=stop))

    def status(self) -> str:
        """How full the context is, counting what is being written."""
        return meter(int(self.llm.n_tokens), self.session.window, self.session.scale, self.full_scale)

    def tell_window(self) -> None:
        """The meter as it stands after a turn, and once a warning where it is nearly full."""
        used, window = self.used, self.session.window
        self.talk.say(meter(used, window, self.session.scale, self.full_scale))
        said = warning(used, window)
        if said and not self._warned:
            self.talk.note(said)
        self._warned = bool(said)

    def tell_reading(self, done: bool) -> None:
        """How the last prompt was read, where that took time or was stopped."""
        last = self.session.reading
        if not done:
            there = last.held + last.restored + last.read
            self.talk.say(f"stopped: {there} of {last.total} tokens are read and kept, asking again goes on there")
        elif last.read_seconds >= _LONG and last.read >= _MANY:
            speed = last.read / last.read_seconds
            self.talk.say(f"read {last.read} tokens in {clock(last.read_seconds)}, {speed:.0f} a second")
        if done and last.restored:
            self.talk.say(f"restored {last.restored} tokens in {last.restore_seconds:.1f} s instead of reading them")

    def _show(self, ask: Callable[[Stop], Iterator[str]]) -> bool:
        shown = None
        with self.interrupt, no_echo():
            pieces = ask(self.interrupt.wanted)
            self._begin()
            try:
                for piece in pieces:
                    if shown is None:
                        self._end_reading()
                        self.tell_reading(True)
                        shown = answer(status=self.status)
                    shown.push(piece)
            finally:
                self._end_reading()
                if shown:
                    shown.end()
        self.stages.tell()
        return self._ended(wrote=shown is not None)

    def _ended(self, *, wrote: bool) -> bool:
        reason = self.session.finish_reason
        if reason == "interrupted":
            if wrote:
                self.talk.say("stopped: what is written is kept, /regen answers again")
            else:
                self.tell_reading(False)
        elif reason == "length":
            self.talk.note(f"the answer was cut at {self.session.sampling.n_predict} tokens, as -n says")
        elif not wrote:
            self.talk.note("the answer is empty")
        return reason != "interrupted"

    def _begin(self) -> None:
        self.bar.__enter__()
        self.stages.bar = self.bar

    def _end_reading(self) -> None:
        self.bar.close()
        self.stages.bar = None

    def _scale_words(self) -> str:
        return f"S = {self.session.scale:.3g}" if self.full_scale > 1 else ""


def _moved(change: StageChange) -> str:
    verb = "grows" if change.after > change.before else "returns"
    return f"context {verb} at {change.n_tokens} tokens: S = {change.before:.3g} -> {change.after:.3g}"
