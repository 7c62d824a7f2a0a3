"""The evaluations as functions on a plain llama_cpp.Llama, one call each: perplexity, needles, RULER.

Each empties the model's cache and reads at most its context. Ways are compared by calling them on models loaded in
different ways, or between engine.set_table calls; `mrrope eval` does that, resumes and reports.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineTrouble, MrropeError
from ..progress import Progress
from . import trie
from .essay import Essay, words_of
from .losses import buckets, half_chunks, token_nll
from .passes import TaskPass
from .ruler_qa import Documents
from .ruler_tasks import CORE, SEED
from .ruler_tasks import ruler as ruler_samples
from .tasks import DEPTHS, Item, grid_items, sample_items, text_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLES = 5


@dataclass(frozen=True)
class Perplexity:
    """losses: negative log likelihoods in nats, float32 (n,); value i is that of token i + 1 after all before it."""

    losses: NDArray[np.float32]

    @property
    def value(self) -> float:
        """exp of the mean loss."""
        return math.exp(float(self.losses.mean(dtype="float64")))

    def at(self, n: int) -> float:
        """The perplexity of the first `n` losses: with a static table, what a pass over n tokens would have given."""
        return math.exp(float(self.losses[:n].mean(dtype="float64")))

    def buckets(self, width: int = 4096) -> list[tuple[int, float]]:
        """(middle position, perplexity) of stretches of `width` losses; a last half stretch counts."""
        return list(zip(*buckets(self.losses, width), strict=True))


@dataclass(frozen=True)
class Asked:
    """One question and its answer. depth: per cent of the text before the needle; loss: of the truth, nats a token."""

    task: str
    length: int
    depth: float | None
    expected: tuple[str, ...]
    said: str
    score: float
    rouge1: float
    loss: float | None

    @property
    def exact(self) -> bool:
        return self.score == 1.0


@dataclass(frozen=True)
class Answers:
    """All answers, lengths first. `score` is their mean, from 0 to 1; `loss` that of those that have one."""

    asked: tuple[Asked, ...]

    @property
    def score(self) -> float:
        return sum(each.score for each in self.asked) / len(self.asked)

    @property
    def loss(self) -> float | None:
        known = [each.loss for each in self.asked if each.loss is not None]
        return sum(known) / len(known) if known else None

    def by(self, key: Callable[[Asked], Any]) -> dict[Any, Answers]:
        """The same in groups, such as answers.by(lambda a: a.length)."""
        found: dict[Any, list[Asked]] = {}
        for each in self.asked:
            found.setdefault(key(each), []).append(each)
        return {name: Answers(tuple(its)) for name, its in found.items()}


def perplexity(
    llm: Any,
    text: str | os.PathLike[str] | Sequence[int],
    *,
    n_tokens: int | None = None,
    half_window: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Losses of a text, read in one pass from its beginning, BOS first where the model has one.

    text: the text itself, a pathlib.Path of a UTF-8 file, or token ids. n_tokens: read no more (default: what the
    context holds). half_window: llama-perplexity's protocol instead: pieces of so many tokens, each read anew with BOS
    in the place of its first token, and the second half of each counted.
    Raises MrropeError for a text of fewer than two tokens, or shorter than one piece, Refused for a str that is a
    file's name.
    """
    tokens = _text_tokens(llm, text)
    most = llm.n_ctx() + 1 if n_tokens is None else n_tokens
    if len(tokens) < 2:
        raise MrropeError("no perplexity", why=f"the text has {len(tokens)} tokens", fix="give a longer text")
    if half_window is not None:
        if not 2 <= half_window <= min(llm.n_ctx(), len(tokens)):
            raise MrropeError(
                f"no pieces of {half_window} tokens",
                why=f"the text has {len(tokens)} tokens and the context {llm.n_ctx()}",
                fix="a smaller half_window, or a longer text",
            )
        return Perplexity(half_chunks(llm, tokens[:n_tokens], half_window, progress))
    if most > llm.n_ctx() + 1:
        raise EngineTrouble(
            f"{most} tokens do not fit in the context",
            why=f"it was made for {llm.n_ctx()}",
            fix="load the model with a larger n_ctx, or leave n_tokens out",
        )
    return Perplexity(token_nll(llm, tokens[:most], progress))


def needle(
    llm: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    samples: int = 1,
    seed: int = SEED,
    prose: str | None = None,
    progress: Progress | None = None,
) -> Answers:
    """A number hidden at every depth of every length, asked for with RULER's words; shared beginnings are read once.

    lengths: in tokens, question and answer included; depths: shares of the text from 0 to 1 before the needle.
    prose: the haystack, from its first sentence on; noise if None. Raises MrropeError for lengths that cannot be,
    Refused for prose that is a file's name.
    """
    prose = None if prose is None else words_of(prose)
    task = TaskPass("needle", "", tuple(lengths), (), seed, samples, llm.n_ctx(), tuple(depths))
    return _ask(llm, "needle", [item for n in lengths for item in grid_items(llm, task, n, prose)], progress)


def ruler(
    llm: Any,
    tasks: Iterable[str] = CORE,
    length: int = 4096,
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
    essay: Essay | None = None,
    documents: Documents | None = None,
    progress: Progress | None = None,
) -> Answers:
    """RULER's tasks at one length in tokens, answer included; `answers.by(lambda a: a.task)` has each task's score.

    essay: what needles are hidden in, for the tasks that need prose; documents: for qa_1 or qa_2.
    Raises MrropeError for a task that is none or lacks what it needs, Refused if the length is too short for one.
    """
    found: dict[str, list[Item]] = {}
    for name in tasks:
        made = ruler_samples(llm, name, length, n=samples, seed=seed, essay=essay, documents=documents)
        task = TaskPass(f"ruler/{name}", "", (length,), (), seed, samples, llm.n_ctx())
        found[name] = list(sample_items(llm, task, made))
    asked = [each for name, items in found.items() for each in _ask(llm, name, items, progress).asked]
    return Answers(tuple(asked))


def _ask(llm: Any, task: str, items: list[Item], progress: Progress | None) -> Answers:
    asked: list[Asked] = []
    for item, said in zip(items, trie.run(llm, [item.prompt for item in items], progress=progress), strict=True):
        cell = item.result(task, "", said, text_of(llm, said.generated))
        values = (cell[name] for name in ("said", "score", "rouge1", "loss"))
        asked.append(Asked(task, item.length, item.depth, item.references, *values))
    return Answers(tuple(asked))


def _text_tokens(llm: Any, text: str | os.PathLike[str] | Sequence[int]) -> list[int]:
    if isinstance(text, os.PathLike):
        from .spec import read_text

        text = read_text(Path(text))
    elif isinstance(text, str):
        text = words_of(text)
    return list(llm.tokenize(text.encode(), add_bos=True, special=False) if isinstance(text, str) else text)
