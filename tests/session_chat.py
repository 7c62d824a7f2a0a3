"""Conversations with tiny models for tests of sessions, in this process and in new ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrrope_gguf import ChatSession
from mrrope_gguf.model import load
from mrrope_gguf.sessions.reader import Reading
from mrrope_gguf.sessions.store import Store
from tests import tiny

BOOK = "the sea was calm and the men of the inn ran on in the rain. " * 12
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}
GREEDY: dict[str, Any] = {"temp": 0, "n_predict": 12}


@dataclass
class Told:
    """What a conversation gave: answers, tokens in memory at the end, how each prompt was read, notes, S."""

    answers: list[str]
    tokens: list[int]
    readings: list[Reading]
    notes: list[str]
    scale: float


def small(folder: Path, name: str = "m", **changes: Any) -> Path:
    """A tiny model that chats: 2048 tokens unless told otherwise."""
    return tiny.make(folder / f"{name}.gguf", **{"n_ctx": 2048, **changes})


def open_small(path: Path, **options: Any) -> Any:
    return load(path, **{**ONE_THREAD, **options})


def converse(
    path: Path, questions: Sequence[str], store: Path | bool | None, *, documents: Sequence[str] = (BOOK,),
    name: str | None = None, save: bool = True, options: dict[str, Any] | None = None, **session: Any,
) -> Told:  # fmt: skip
    """Ask the questions on a model that is loaded for it and closed again."""
    llm, notes = open_small(path, **(options or {})), list[str]()
    chat = ChatSession(
        llm, documents=documents, store=store, name=name, on_note=notes.append, **{**GREEDY, **session}  # type: ignore[arg-type]
    )  # fmt: skip
    answers, readings = [], []
    for question in questions:
        answers.append(chat.ask(question))
        readings.append(chat.reading)
    if save:
        chat.save()
    chat.close()
    held, scale = llm.input_ids[: llm.n_tokens].tolist(), chat.scale
    llm.close()
    return Told(answers, held, readings, notes, scale)


def states(folder: Path) -> list[Path]:
    """The files of saved states in a store."""
    return sorted(folder.glob("states/*/*.state"))


def left_over(folder: Path) -> list[str]:
    """Names of temporary files in a store."""
    return sorted(path.name for path in folder.rglob(".*.tmp"))


def fuse(n: int, folder: Path, source: Path, tokens: Sequence[int], parts: dict[str, str]) -> None:
    """Save llama.cpp's file `source` into the store, and end the process (SIGKILL) at the n-th call that changes it."""
    import os
    import signal

    from mrrope_gguf.sessions.fingerprint import Fingerprint

    left = [n]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if name == "pwrite":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, counted)

    def write(path: str) -> None:
        data = source.read_bytes()
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        for at in range(0, len(data), 1 + len(data) // 3):
            os.pwrite(fd, data[at : at + 1 + len(data) // 3], at)
        os.close(fd)

    for name in ("mkdir", "open", "pwrite", "fsync", "link", "replace", "unlink", "utime"):
        wrap(name)
    Store(folder).save(Fingerprint(parts), tokens, write, size=1, whole=True, scale=1.0)
    sys.exit(7)
