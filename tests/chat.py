"""Conversations for tests of `mrrope chat`: without a terminal, and the program in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrrope_gguf.chat.commands import Commands
from mrrope_gguf.chat.loop import converse
from mrrope_gguf.chat.prompt import Leave
from mrrope_gguf.chat.speaker import Speaker, Stages
from mrrope_gguf.chat.talk import Talk
from mrrope_gguf.session import ChatSession
from tests import tiny
from tests.patched import ROOT, environment

MROPE = [sys.executable, "-m", "mrrope_gguf", "chat"]


class Listener(Talk):
    """Collects what is said; answers(question) is what the user says to a question."""

    def __init__(self, answers: Callable[[str], str | None] = lambda _: None) -> None:
        super().__init__(can_ask=True)
        self.said = list[str]()
        self.asked = list[str]()
        self._answers = answers

    def say(self, line: str = "") -> None:
        self.said.append(line)

    def error(self, error: Exception) -> None:
        self.said.append(str(error))

    def _ask(self, question: str) -> str | None:
        self.asked.append(question)
        return self._answers(question)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Typed:
    """A prompt at which these lines are typed."""

    def __init__(self, lines: Sequence[str | Callable[[], str]]) -> None:
        self._lines = list(lines)

    def ask(self) -> str:
        if not self._lines:
            raise Leave
        line = self._lines.pop(0)
        return line if isinstance(line, str) else line()


def speak(llm: Any, talk: Listener, *, store: Any = False, **session: Any) -> Speaker:
    """A speaker with a session on a model that is loaded."""
    speaker = Speaker(llm, talk, Stages(talk.say), 1.0)
    speaker.session = ChatSession(
        llm, store=store, on_progress=speaker.bar, on_note=talk.note, **{"temp": 0, "n_predict": 8, **session}
    )
    return speaker


def talk_about(speaker: Speaker, lines: Sequence[str | Callable[[], str]], open_session: Any = None) -> None:
    """Type these lines into a conversation, and leave."""
    converse(speaker, Commands(speaker, ["a model"], open_session), Typed(lines))


def surroundings(data: Path, lib: Path | None = None, **extra: str) -> dict[str, str]:
    """The environment of the program: its data in `data`, on stock or the libllama in `lib`."""
    kept = {name: value for name, value in extra.items() if value}
    env = environment(lib, {"MRROPE_DATA": str(data), "PYTHONIOENCODING": "utf-8", **kept})
    return {name: value for name, value in env.items() if not name.startswith(("LLAMA_ARG_", "NO_COLOR"))} | kept


def run(
    *words: object, data: Path, lib: Path | None = None, given: bytes | None = None, env: dict[str, str] | None = None,
    timeout: float = 120, **options: Any,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    """`mrrope chat` with these words, no terminal near, `given` in its stdin (nothing unless told)."""
    stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    return subprocess.run(
        [*MROPE, *map(str, words)], cwd=ROOT, env={**surroundings(data, lib), **(env or {})}, capture_output=True,
        timeout=timeout, check=False, **stdin, **options,
    )  # fmt: skip


def endless(path: Path, **changes: Any) -> Path:
    """A tiny model whose greedy answers never end by themselves: the logits of the token that would are 0."""
    tiny.make(path, **changes)
    weight = np.array(tiny.weight(path, "output.weight"))
    weight[2] = 0
    return tiny.make(path, **changes, tensors={"output.weight": weight})


def as_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0
