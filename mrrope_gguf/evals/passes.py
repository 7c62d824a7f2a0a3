"""The parts of a suite that run as one: a way on a text, or a way through a task's questions. Each is made of cells.

A cell is one line of results and has a name of its own, known before anything runs: what is finished is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..meter import Span
from .spec import BLOCK, BUCKET

Result = dict[str, Any]
Emit = Callable[[str, Result], object]  # a finished cell: its name and what it gave
Tick = Callable[[int, int], None]  # tokens read of this pass, and in all
Done = Mapping[str, Result]


@dataclass(frozen=True)
class LossPass:
    """A way reads a text and its losses are kept (ppl), or how far its guesses are from the original's (kl).

    cells: (start, end) in positions; position i predicts token i + 1. length: in tokens, for a way of mode B.
    window: n_ctx_orig, which `truncate` is given of the text. goes_on: a budget cut it off here, for another call to
    go on.
    """

    task: Literal["ppl", "kl"]
    text: str
    way: str
    cells: tuple[tuple[int, int], ...]
    window: int
    length: int | None = None
    goes_on: bool = False

    @property
    def end(self) -> int:
        return self.cells[-1][1]

    @property
    def keys(self) -> list[str]:
        return [self.key(*cell) for cell in self.cells]

    def key(self, start: int, end: int) -> str:
        return f"{self.task}/{self.text}/{self.way}/{start}-{end}"

    def missing(self, done: Done) -> list[tuple[int, int]]:
        return [cell for cell in self.cells if self.key(*cell) not in done]

    def parts(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of a cell truncation reads at once: half a window, and the half before it as context."""
        half = max(self.window // 2, 1)
        return [(at, min(at + half, end)) for at in range(start, end, half)] if end > self.window else [(start, end)]

    def twin(self, key: str) -> str | None:
        """The cell of `none` that has this very result: truncation takes nothing away inside the window."""
        start, end = map(int, key.rsplit("/", 1)[1].split("-"))
        return replace(self, way="none").key(start, end) if self.way == "truncate" and end <= self.window else None

    def spans(self, done: Done) -> list[Span]:
        """What is read for the cells that are missing."""
        left = self.missing(done)
        if not left:
            return []
        alone = [cell for cell in left if self.way == "truncate" and cell[1] > self.window]
        spans = [Span(0, self.window) for cell in alone for _ in self.parts(*cell)]
        if on := [cell for cell in left if cell not in alone]:
            spans += [Span(0, on[0][0]), *(Span(start, end - start) for start, end in on)]
        return spans * 2 if self.task == "kl" else spans

    def describe(self) -> str:
        at = "" if self.length is None else f" at {self.length}"
        return f"{self.task} {self.text} {self.way}{at}"


@dataclass(frozen=True)
class TaskPass:
    """A way answers the questions of one task. lengths: in tokens, prompt and answer; of a way of mode B one alone.

    samples: names of a length's cells, one for each question; tag: what of such a name is the same for all of them.
    cost: what each length adds to the tokens that are read. n: texts a length; keys_per_text: questions on each of
    them, where there are several.
    """

    task: str
    way: str
    lengths: tuple[int, ...]
    samples: tuple[str, ...]
    seed: int
    n: int
    window: int
    depths: tuple[float, ...] = ()
    keys_per_text: int = 1
    cost: tuple[tuple[Span, ...], ...] = ()
    tag: str = ""

    @property
    def keys(self) -> list[str]:
        return [self.key(length, sample) for length in self.lengths for sample in self.samples]

    def key(self, length: int, sample: str) -> str:
        return f"{self.task}/{self.way}/{length}/{sample}"

    def twin(self, key: str) -> str | None:
        """The cell of `none` that has this very result: truncation takes nothing away inside the window."""
        length, sample = key.rsplit("/", 2)[1:]
        inside = self.way == "truncate" and int(length) <= self.window
        return replace(self, way="none").key(int(length), sample) if inside else None

    def spans(self, done: Done) -> list[Span]:
        """What is read for the cells that are missing: their share of what each length costs."""
        found: list[Span] = []
        for length, spans in zip(self.lengths, self.cost, strict=False):
            share = sum(self.key(length, each) not in done for each in self.samples) / len(self.samples)
            found += [span._replace(n=round(span.n * share)) for span in spans if share]
        return found

    @property
    def length(self) -> int | None:
        """The length a way of mode B takes its table from."""
        return self.lengths[0] if len(self.lengths) == 1 else None

    def describe(self) -> str:
        at = f" at {self.lengths[0]}" if len(self.lengths) == 1 else ""
        return f"{self.task} {self.way}{at}"


Pass = LossPass | TaskPass


def buckets(start: int, end: int, width: int) -> tuple[tuple[int, int], ...]:
    """Cells of `width` positions from `start` to `end`; a rest of less than a block joins the one before it.

    >>> buckets(0, 10000, 4096)
    ((0, 4096), (4096, 8192), (8192, 10000))
    >>> buckets(0, 8200, 4096)
    ((0, 4096), (4096, 8200))
    """
    starts = [at for at in range(start, end, width) if end - at >= BLOCK or at == start]
    return tuple(zip(starts, [*starts[1:], end], strict=True))


def half_window(window: int) -> int:
    """Half a window in whole blocks, of which a cell of truncation is made.

    >>> half_window(8192), half_window(1000), half_window(256)
    (4096, 256, 256)
    """
    return max(window // 2 // BLOCK * BLOCK, BLOCK)


def loss_passes(
    task: Literal["ppl", "kl"], text: str, way: str, lengths: Sequence[int], window: int, *, by_length: bool
) -> list[LossPass]:
    """The passes of one way over one text: one to the longest length, or one for each length in mode B.

    kl ends with the window. Past it, a cell of truncate is half a window, in whole blocks.
    """
    lengths = sorted({min(length, window) for length in lengths} if task == "kl" else set(lengths))
    if by_length:
        return [LossPass(task, text, way, ((0, length),), window, length) for length in lengths]
    end = lengths[-1]
    half = half_window(window)
    width = min(BUCKET, half)
    inside = buckets(0, min(end, window), width)
    past = buckets(window, end, half if way == "truncate" else width) if end > window else ()
    return [LossPass(task, text, way, (*inside, *past), window)]
