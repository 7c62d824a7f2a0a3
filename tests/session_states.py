"""Saved states for tests: made, damaged, and what goes on from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.sessions.entry import Damaged, OtherVersion, check_state, read_head
from mrrope_gguf.sessions.fingerprint import fingerprint
from mrrope_gguf.sessions.memory import Memory
from mrrope_gguf.sessions.reader import Reader
from mrrope_gguf.sessions.store import Store
from tests import tiny

TEXT = tiny.tokens(400)


def keep(llm: Any, folder: Path, tokens: list[int], **options: Any) -> Path:
    """Read these tokens and save them."""
    memory, store = Memory(llm), Store(folder, **options)
    memory.clear()
    memory.read(tokens)
    return store.save(
        fingerprint(llm), tokens, memory.save, size=memory.state_size(), whole=memory.whole, scale=memory.scale
    )


def reader(llm: Any, folder: Path, notes: list[str] | None = None) -> Reader:
    """An empty memory with a store."""
    note = notes.append if notes is not None else pytest.fail
    found = Reader(llm, Store(folder, note=note), note)
    found.memory.clear()
    return found


def next_token(llm: Any) -> tuple[int, list[float]]:
    """The likeliest token and the logits that made it."""
    import llama_cpp

    logits = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)[: llm.n_vocab()]
    return max(range(len(logits)), key=logits.__getitem__), logits


def fresh(llm: Any, tokens: list[int]) -> tuple[int, list[float]]:
    """The same of tokens that were all read now, the last one by itself as after a restore."""
    memory = Memory(llm)
    memory.clear()
    memory.read(tokens[:-1])
    memory.read(tokens[-1:])
    return next_token(llm)


def refused(path: Path, key: bytes) -> str:
    """Why a state would not be used; nothing if it would."""
    fd = os.open(path, os.O_RDONLY)
    try:
        check_state(fd, read_head(fd, key))
    except (Damaged, OtherVersion) as error:
        return error.why
    finally:
        os.close(fd)
    return ""
