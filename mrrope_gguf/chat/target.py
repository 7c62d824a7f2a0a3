"""The model of a chat: which file it is, what its header says of its context, and what a session remembers of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..facts import RopeFacts, read_facts
from ..gguf.index import open_gguf, open_split
from ..gguf.source import require_no_journal
from ..paths import data_dir
from ..sessions.named import check_name, named_files, read_named
from ..text import printable
from .options import Options


@dataclass(frozen=True)
class Target:
    """A model file. `n_ctx` is its whole context, of which the model was trained for `n_ctx_orig` tokens.

    `method`: the table it was extended with, None for a file that was not. `elastic`: whether that table may grow.
    """

    path: Path
    facts: RopeFacts
    n_ctx: int
    n_ctx_orig: int
    method: str | None
    elastic: bool

    @property
    def name(self) -> str:
        return printable(self.path.name)

    def __str__(self) -> str:
        if self.method is None:
            return f"{self.name}: {self.facts.arch.name}, {self.n_ctx} tokens of context"
        grows = "elastic" if self.elastic else "static"
        return f"{self.name}: {self.facts.arch.name}, {self.n_ctx_orig} tokens extended to {self.n_ctx}" + (
            f" ({grows} {printable(self.method)})"
        )


@dataclass(frozen=True)
class Remembered:
    """What a named conversation says of how it was held: its model's file, context, and the table in effect, if any."""

    path: str
    n_ctx: int
    tokens: int
    method: str | None
    scale: float


def remembered(name: str) -> Remembered | None:
    """The conversation of this name, None for a new one. Raises Refused for what is no name, FileTrouble if damaged."""
    check_name(name)
    files = dict(named_files(data_dir() / "sessions" / "named"))
    values: dict[str, Any] | None = read_named(files[name]) if name in files else None
    if values is None:
        return None
    table = re.match(r"(?:elastic|static) (mrrope-\w+)(?: to|,) S = ([0-9.]+)", str(values["parts"].get("table")))
    return Remembered(
        path=str(values.get("path", "")),
        n_ctx=int(values.get("n_ctx") or 0),
        tokens=values["tokens"],
        method=table[1] if table else None,
        scale=float(table[2]) if table else 1.0,
    )


def find(options: Options, before: Remembered | None, say: Callable[[str], object]) -> Path:
    """The file that was named, fetched from the Hub if need be; of a session that goes on, its own by default.

    Raises Refused where nothing names a model, and what hub.fetch raises.
    """
    if options.hf:
        from ..hub import fetch

        return fetch(options.hf, say=say).path
    named = options.model or (before.path if before else "")
    if not named:
        raise Refused(
            "no model is named",
            why="-f takes all names that follow it" if options.files else "chat needs a GGUF file",
            fix="`mrrope chat MODEL.gguf -f BOOK.txt`, or -hf user/model",
        )
    return Path(named)


def read(path: Path) -> Target:
    """What the header says. Raises FileTrouble, BadFile, and Refused for what is no model llama.cpp knows."""
    require_no_journal(path)
    first = open_split(path)[0]
    with open_gguf(first) as index:
        facts = read_facts(index)
    mrrope = facts.mrrope or {}
    method = mrrope.get("method")
    return Target(
        path=first,
        facts=facts,
        n_ctx=facts.n_ctx_train,
        n_ctx_orig=facts.n_ctx_orig,
        method=str(method) if method not in (None, "none") else None,
        elastic=bool(mrrope.get("elastic", False)) and not facts.arch.static_only,
    )
