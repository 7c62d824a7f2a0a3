"""What every pass of a suite shares: model, settings, texts, and the user's files. Plain values, so that it travels.

A pass may run in this process, or in a worker elsewhere that is handed a Spec and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import texts
from ..errors import FileTrouble, MrropeError, Refused
from ..fetch import Say
from ..gguf.source import FileState, Source
from ..text import printable
from .identity import model_identity, text_sha256
from .ways import Way, parse

BLOCK = 256  # positions whose mean loss is one number of a result
BUCKET = 4096  # positions of one perplexity cell
States = tuple[tuple[Path, FileState], ...]


@dataclass(frozen=True)
class Text:
    """A text to measure on: its name in results, where it lies, and the sha256 of what was there."""

    name: str
    path: str
    sha256: str

    @property
    def public_domain(self) -> bool:
        """Whether it is one of `mrrope texts`, and not a file of the user's that is called so."""
        return self.name in texts.TEXTS and Path(self.path) == texts.TEXTS[self.name].path.resolve()

    def read(self) -> str:
        """Raises FileTrouble if it cannot be read, Refused if it is not what it was."""
        words = read_text(Path(self.path))
        if text_sha256(words) != self.sha256:
            raise Refused(
                f"{self.path}: not the text these results began with",
                why=f"its sha256 was {self.sha256[:12]}... and is {text_sha256(words)[:12]}...",
                fix="put the text back, or give a new --out folder",
            )
        return words


@dataclass(frozen=True)
class Spec:
    """model: path of the GGUF file; sha256: model_identity's; n_ctx: tokens of every context; scale: S, or None.

    options: flash_attn, n_threads, type_k, type_v and further arguments of `load`. files: the user's benchmark files.
    """

    model: str
    sha256: str
    n_ctx: int
    scale: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[Text, ...] = ()
    files: tuple[Text, ...] = ()
    force: bool = False

    def text(self, name: str) -> Text:
        """The text of that name. Raises KeyError."""
        return next(text for text in (*self.texts, *self.files) if text.name == name)

    def way(self, name: str) -> Way:
        """The way of that name at this scale. Raises Refused as `ways.parse` does."""
        (way,) = parse([name], self.scale)
        return way

    @property
    def settings(self) -> dict[str, object]:
        """What of the options changes results beyond rounding: the head of a results file keeps it."""
        shown = {"flash_attn": True, "type_k": None, "type_v": None} | dict(self.options)
        # threads and batches change the last bits alone, and where layers lie is the engine's line
        left_out = (
            "n_threads",
            "n_gpu_layers",
            "n_batch",
            "n_ubatch",
            "swa_full",
            "tensor_split",
            "main_gpu",
            "verbose",
        )
        return {name: value for name, value in sorted(shown.items()) if name not in left_out}

    def check_model(self) -> None:
        """Raise Refused if the model is not the one this suite began with."""
        found = _identity(self.model, _states(self.model), self.force)
        if found != self.sha256:
            raise Refused(
                f"{printable(self.model)}: another model than this suite's",
                why=f"its sha256 is {found[:12]}..., not {self.sha256[:12]}...",
                fix="give every machine the same file",
            )


def _states(path: str) -> States:
    """Every shard with what tells whether it is still the file it was."""
    with Source.open(path) as source:
        return tuple(source.states.items())


@lru_cache(maxsize=4)
def _identity(path: str, _states: States, force: bool) -> str:
    return str(model_identity(path, force=force)["sha256"])


def find_texts(named: Iterable[str], say: Say | None = None) -> tuple[Text, ...]:
    """Texts by the names of `mrrope texts`, which are fetched if need be, or by path.

    A file's name in results is its own without its suffix. Raises FileTrouble for a file that is missing or not UTF-8,
    Refused for two of one name, MrropeError as `texts.save` does.
    """
    return _named([(name, texts.save(name, say) if name in texts.TEXTS else Path(name)) for name in named])


def text_name(given: str) -> str:
    """What results call a text that was named so.

    >>> text_name("voyage-out"), text_name("books/My Own.txt")
    ('voyage-out', 'My Own')
    """
    return given if given in texts.TEXTS else printable(Path(given).stem, limit=80).replace("/", "-")


def find_files(paths: Iterable[str | os.PathLike[str]]) -> tuple[Text, ...]:
    """Benchmark files of the user's, by path. Raises as `find_texts` does."""
    for path in map(Path, paths := list(paths)):
        if not path.exists():
            fix = "name the file that the benchmark's makers publish"
            raise FileTrouble(f"{path}: no such file", why="No such file or directory", fix=fix)
    return _named([(os.fspath(path), Path(path)) for path in paths])


def _named(found: list[tuple[str, Path]]) -> tuple[Text, ...]:
    made: dict[str, Text] = {}
    for given, path in found:
        name = text_name(given)
        if name in made:
            raise Refused(
                f"{given}: a second text of the name {name!r}",
                why="results are kept by the text's name",
                fix="rename one of the files, or give each text once",
            )
        made[name] = Text(name, str(path.resolve()), text_sha256(read_text(path)))
    return tuple(made.values())


def read_text(path: Path) -> str:
    """A UTF-8 file, byte-order mark taken off. Raises FileTrouble if it cannot be read, MrropeError if it is empty."""
    try:
        words = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MrropeError(
            f"{path}: no such text",
            why="it is neither a file nor one of " + ", ".join(texts.TEXTS),
            fix="name a UTF-8 text file, or one of these (`mrrope texts`)",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileTrouble(f"{path}: cannot be read as text", why=str(error), fix="name a UTF-8 text file") from error
    if not words.strip():
        raise MrropeError(f"{path}: an empty text", why=f"it has {len(words)} characters", fix="name another file")
    return words
