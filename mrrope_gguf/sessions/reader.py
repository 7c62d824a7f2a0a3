"""Brings a prompt into a model's memory by the shortest way: what it holds already, a saved state, reading the rest."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineTrouble, FileTrouble, MrropeError
from ..progress import Progress
from .entry import Damaged
from .fingerprint import Fingerprint, fingerprint
from .memory import Memory
from .store import Found, Note, Store, shared

if TYPE_CHECKING:
    from llama_cpp import Llama

CHUNK = 512  # tokens read between two looks at `stop`
RESTORE_FROM = 32  # tokens that a saved state must spare; fewer are read as quickly
SAVE_FROM = 2048  # tokens that are saved as soon as there is time for it, not only at the end
SLOW = 20.0  # seconds of reading after which there is: what they made is not put at risk

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Reading:
    """How a prompt of `total` tokens came into memory: `held` were there, `restored` out of a saved state."""

    total: int = 0
    held: int = 0
    restored: int = 0
    read: int = 0
    restore_seconds: float = 0.0
    read_seconds: float = 0.0


@dataclass(frozen=True)
class _Kept:
    """The saved state this conversation came from or left last."""

    path: Path
    tokens: array[int]
    scale: float


class Reader:
    """The memory of one model and the saved states it may use. note(line) is told what went wrong with a state."""

    def __init__(self, llm: Llama, store: Store | None, note: Note, chunk: int = CHUNK) -> None:
        self.memory = Memory(llm)
        self.store, self.last = store, Reading()
        self._llm, self._note, self._chunk = llm, note, max(1, min(chunk, llm.n_batch))
        self._kept: _Kept | None = None

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self._llm)

    def bring(
        self, tokens: Sequence[int], *, opening: int = 0, progress: Progress | None = None, stop: Stop | None = None
    ) -> bool:
        """Make the memory hold `tokens` and no more, the last one just read; False if stop() ended it before.

        The first `opening` tokens are those that other conversations will share; a memory that cannot be wound back to
        them is saved there. progress(done, total) counts what must be read. Ctrl-C and stop leave what was read.
        """
        began = time.monotonic()
        # one is always read, for its logits
        held = self.memory.keep(self.memory.shares(tokens[:-1]))
        restored = self._restore(tokens, held)
        begin, now = self.memory.n, time.monotonic()
        try:
            for goal in sorted({min(opening, len(tokens)), len(tokens)}):
                if goal > self.memory.n and not self._read(tokens[:goal], begin, len(tokens), progress, stop):
                    return False
                if goal == opening and begin < goal and not self.memory.whole:
                    self.save()
        finally:
            read, seconds = self.memory.n - begin, time.monotonic() - now
            self.last = Reading(len(tokens), begin - restored, restored, read, now - began, seconds)
        return True

    def secure(self) -> None:
        """Save what the last prompt left in memory, if reading it took long. It takes a while: not before an answer."""
        if self.last.read_seconds >= SLOW and self.unsaved >= SAVE_FROM:
            self.save()

    def save(self) -> bool:
        """Save what the memory holds; False, with a note, where that was not possible."""
        held = self.memory.tokens
        if self.store is None or not self.store.limit or not held:
            return False
        before = self._kept
        if before and before.tokens == held and before.path.exists():
            return True
        whole, scale = self.memory.whole, self.memory.scale
        try:
            path = self.store.save(
                self.fingerprint(), held, self.memory.save, size=self.memory.state_size(), whole=whole, scale=scale
            )
        except (MrropeError, OSError) as error:
            self._note(f"not saved, the conversation goes on: {in_a_line(error)}")
            return False
        self._kept = _Kept(path, held, scale)
        # the longer state does all that the shorter one did, unless keys would have to be rotated back for it
        if (
            before
            and before.path != path
            and whole
            and (before.scale, before.tokens) == (scale, held[: len(before.tokens)])
        ):
            self.store.discard(before.path)
        return True

    @property
    def unsaved(self) -> int:
        """How many tokens of the memory no saved state of this conversation holds."""
        held = self.memory.tokens
        return len(held) - (shared(held, self._kept.tokens) if self._kept else 0)

    @property
    def state(self) -> Path | None:
        """The saved state this conversation came from or left last."""
        return self._kept.path if self._kept else None

    def _restore(self, tokens: Sequence[int], held: int) -> int:
        """Take the most useful saved state, if that is worth it; how many tokens of it are in memory then."""
        if self.store is None or len(tokens) - held <= RESTORE_FROM:
            return 0
        try:
            mark = self.fingerprint()
            found = self.store.find(mark, tokens[:-1], more_than=held + RESTORE_FROM, n_ctx=self._llm.n_ctx())
        except (MrropeError, OSError) as error:
            self._note(f"saved states are not used: {in_a_line(error)}")
            return 0
        for one in found:
            if self._take(one):
                return one.usable
        return 0

    def _take(self, found: Found) -> bool:
        assert self.store is not None
        tokens = found.head.tokens
        try:
            self.store.load(found, lambda path: self.memory.restore(path, len(tokens)))
        except (FileTrouble, EngineTrouble) as error:
            # gone: another process needed the room
            if isinstance(error, Damaged) or found.path.exists():
                self._note(f"a saved state was refused, and is read again: {in_a_line(error)}")
            return False
        self._kept = _Kept(found.path, tokens, found.head.scale)
        return self.memory.keep(found.usable) == found.usable

    def _read(
        self, tokens: Sequence[int], begin: int, total: int, progress: Progress | None, stop: Stop | None
    ) -> bool:
        while (at := self.memory.n) < len(tokens):
            if stop is not None and stop():
                return False
            self.memory.read(tokens[at : at + self._chunk])
            if progress:
                progress(self.memory.n - begin, total - begin)
        return True


def in_a_line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MrropeError):
        return "; ".join(filter(None, (error.what, error.why, error.fix)))
    return str(error)
