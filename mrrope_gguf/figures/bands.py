"""How much the band's two bounds matter (the paper's Fig. 7 and 8): perplexity past the window as one of them moves.

beta_fast and beta_slow are the turns within n_ctx_orig that bound the middle pairs, the paper's alpha and beta. One is
moved while the other stays at its usual value. One load on the patched engine runs all tables; each finished run is
kept in a log, and the same command goes on where it was cut off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import EngineTrouble, Refused
from ..evals.runlog import RunLog
from ..evals.ways import Way, parse
from ..fetch import Say
from ..progress import Progress
from . import style
from .common import Row, aligned, figure_ways, way_table
from .words import Words

if TYPE_CHECKING:
    from ..evals.host import Host
    from ..tables import RopeTable

FAST, SLOW = (8.0, 16.0, 32.0, 64.0), (0.5, 1.0, 2.0, 4.0)
USUAL = (32.0, 1.0)
METHODS = "yarn,mrrope-uni,mrrope-pro"
BLOCK = 256  # positions whose mean loss is kept


class Point(NamedTuple):
    """One table of the sweep."""

    method: str
    beta_fast: float
    beta_slow: float

    @property
    def name(self) -> str:
        return f"{self.method}/beta_fast={self.beta_fast:g}/beta_slow={self.beta_slow:g}"


@dataclass(frozen=True)
class Measured:
    """What one table gave. losses: mean NLL of consecutive blocks of BLOCK positions; needle: mean answer NLL."""

    point: Point
    d_l: int
    d_h: int
    losses: tuple[float, ...]
    weights: tuple[int, ...]
    needle: float | None

    @property
    def perplexity(self) -> float:
        total = sum(n * loss for n, loss in zip(self.weights, self.losses, strict=True))
        return exp(total / sum(self.weights))


@dataclass(frozen=True)
class Bands:
    """The whole sweep: perplexity of positions start..end of one text, in the order of the curves."""

    model: str
    text: str
    scale: float
    n_ctx_orig: int
    start: int
    end: int
    points: tuple[Measured, ...]

    def curve(self, method: str, moved: str) -> list[Measured]:
        """The points of a method along which beta_fast or beta_slow moves, the other at its usual value."""
        other = {"beta_fast": "beta_slow", "beta_slow": "beta_fast"}[moved]
        usual = USUAL[other == "beta_slow"]
        found = [m for m in self.points if m.point.method == method and getattr(m.point, other) == usual]
        return sorted(found, key=lambda m: float(getattr(m.point, moved)))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(m.point.method for m in self.points))

    def to_json(self) -> dict[str, object]:
        facts = {"model": self.model, "text": self.text, "scale": self.scale, "n_ctx_orig": self.n_ctx_orig}
        return {"figure": "bands", **facts, "start": self.start, "end": self.end, "points": self.rows()}

    def rows(self) -> list[Row]:
        return [
            {
                **m.point._asdict(), "d_l": m.d_l, "d_h": m.d_h, "perplexity": round(m.perplexity, 4),
                **({} if m.needle is None else {"needle_nll": m.needle}),
            }
            for m in self.points
        ]  # fmt: skip

    def render(self) -> str:
        needles = any(m.needle is not None for m in self.points)
        head = ["method", "beta_fast", "beta_slow", "d_l", "d_h", "perplexity", *["needle NLL"] * needles]
        rows = [
            [m.point.method, f"{m.point.beta_fast:g}", f"{m.point.beta_slow:g}", m.d_l, m.d_h, f"{m.perplexity:.3f}"]
            + ([f"{m.needle:.3f}" if m.needle is not None else ""] if needles else [])
            for m in self.points
        ]
        title = f"{self.model}: perplexity of positions {self.start} to {self.end} of {self.text}, S = {self.scale:g}"
        return f"{title}\n{aligned([head, *rows])}"

    def draw(self, path: Path) -> None:
        _draw(self, path)


def bands(
    model: str | os.PathLike[str], *, methods: str = METHODS, scale: float = 4.0, beta_fast: Sequence[float] = FAST,
    beta_slow: Sequence[float] = SLOW, words: Words, length: int | None = None, needle: bool = False,
    log: RunLog | None = None, n_threads: int | None = None, progress: Progress | None = None, say: Say | None = None,
) -> Bands:  # fmt: skip
    """Measure every table of the sweep that the log does not hold yet.

    length: the text's length in tokens, by default a quarter past the window; perplexity is that of the positions past
    the window. needle: also ask for ten numbers hidden in noise of the same length, and keep the mean loss of the
    answers. Raises Refused for betas that cross, a length within the window or a model without RoPE, EngineTrouble
    without the patched engine, MrropeError for a text that is too short.
    """
    from ..evals.host import Host

    ways = {way.name: way for way in figure_ways(methods, scale)}
    points = sweep(list(ways), beta_fast, beta_slow)
    n_ctx_orig = _window(model)
    end = length or n_ctx_orig + n_ctx_orig // 4
    if end <= n_ctx_orig:
        raise Refused(
            f"{end} tokens: the sweep is of what lies past the window",
            why=f"the window of this model is {n_ctx_orig} tokens",
            fix=f"--ctx-size {n_ctx_orig + n_ctx_orig // 4}, or any length above {n_ctx_orig}",
        )
    with Host(model, n_ctx=end + 1, flash_attn=False, n_threads=n_threads, say=say) as host:
        _require_tables(host)
        host.check(ways.values())
        runs = _Runs(host, ways, words, end, log, progress)
        runs.open(scale)
        found = runs.make(points, needle)
        return Bands(host.name, words.name, float(scale), host.n_ctx_orig, host.n_ctx_orig, end, tuple(found))


def sweep(methods: Sequence[str], beta_fast: Sequence[float], beta_slow: Sequence[float]) -> list[Point]:
    """Every point once: for each method beta_fast moved with beta_slow at 1, then beta_slow with beta_fast at 32.

    Raises Refused where beta_fast would not be above beta_slow, or one of them is no finite number above 0.
    """
    pairs = dict.fromkeys(chain(((float(f), USUAL[1]) for f in beta_fast), ((USUAL[0], float(s)) for s in beta_slow)))
    for fast, slow in pairs:
        if not (isfinite(fast) and isfinite(slow) and fast > slow > 0.0):
            raise Refused(
                f"a band from {fast:g} down to {slow:g} turns",
                why="beta_fast must be above beta_slow, and both finite and above 0",
                fix=f"--beta-fast above {USUAL[1]:g}, --beta-slow below {USUAL[0]:g}",
            )
    moved = [Point(m, *pair) for m in methods if m != "none" for pair in pairs]
    return [Point("none", *USUAL)] * ("none" in methods) + moved


def _window(model: str | os.PathLike[str]) -> int:
    from ..evals.ways import reach
    from .common import model_facts

    return reach(model_facts(model))


def _require_tables(host: Host) -> None:
    from .. import engine

    if not engine.loaded_library().has_rope_table:
        because, fix = engine.why_stock()
        raise EngineTrouble(
            f"{host.name}: a sweep over tables needs the patched engine",
            why=f"the libllama in {engine.loaded_library().path.parent} cannot change its table; {because}",
            fix=fix,
        )


class _Runs:
    """The sweep's runs on one host, each in the log once it is finished."""

    def __init__(
        self, host: Host, ways: dict[str, Way], words: Words, end: int, log: RunLog | None, progress: Progress | None
    ) -> None:
        self.host, self.ways, self.words, self.end, self.log, self.progress = host, ways, words, end, log, progress
        self.done: dict[str, dict[str, Any]] = {}
        self.read = self.total = 0

    def open(self, scale: float) -> None:
        """See that the log belongs to this very sweep, and take what it holds."""
        from ..evals.identity import engine_identity, make_head, model_identity, open_head

        if self.log is None:
            return
        # the number of threads may change from run to run
        settings: dict[str, object] = {**self.host.settings, "figure": "bands", "text": self.words.sha256}
        settings |= {"start": self.host.n_ctx_orig, "end": self.end}
        settings.pop("n_threads", None)
        head = make_head(
            model_identity(self.host.path), self.host.facts, [], engine=engine_identity(), scale=float(scale),
            texts={self.words.name: self.words.sha256}, settings=settings,
        )  # fmt: skip
        open_head(self.log, head)
        self.done = self.log.runs()

    def make(self, points: Sequence[Point], needle: bool) -> list[Measured]:
        kinds = ("ppl", "needle") if needle else ("ppl",)
        todo = [(kind, point) for point in points for kind in kinds if f"{kind}/{point.name}" not in self.done]
        self.total = self.end * len(todo)
        for i, (kind, point) in enumerate(todo):
            self.read = i * self.end
            began = time.perf_counter()
            result = self._perplexity(point) if kind == "ppl" else self._needles(point)
            result["seconds"] = round(time.perf_counter() - began, 1)
            self.done[f"{kind}/{point.name}"] = result
            if self.log:
                self.log.add(f"{kind}/{point.name}", result)
        return [self._measured(point, needle) for point in points]

    def _measured(self, point: Point, needle: bool) -> Measured:
        table, ppl = self._table(point), self.done[f"ppl/{point.name}"]
        loss = float(self.done[f"needle/{point.name}"]["loss"]) if needle else None
        sizes = [min(BLOCK, self.end - at) for at in range(self.host.n_ctx_orig, self.end, BLOCK)]
        return Measured(point, table.d_l, table.d_h, tuple(ppl["blocks"]), tuple(sizes), loss)

    def _table(self, point: Point) -> RopeTable:
        way = self.ways[point.method]
        return way_table(self.host.facts, self.host.name, way, point.beta_fast, point.beta_slow)

    def _switch(self, point: Point) -> Any:
        from .. import engine

        llm = self.host.switch(parse("none")[0])
        engine.set_table(llm, None if point.method == "none" else self._table(point))
        return llm

    def _perplexity(self, point: Point) -> dict[str, Any]:
        """Mean losses of the blocks past the window; what stands before them is read without logits."""
        import numpy as np

        from ..evals.decode import Decoder
        from ..kernels import nll

        llm, start = self._switch(point), self.host.n_ctx_orig
        tokens = self.words.tokens(llm, self.end + 1)
        targets = np.asarray(tokens[start + 1 :], dtype=np.int64)
        losses = np.empty(len(targets), dtype=np.float32)
        with Decoder(llm) as decoder:
            for _ in self._told(decoder, tokens[:start], every=False):
                pass
            at = 0
            for logits in self._told(decoder, tokens[start : self.end], every=True):
                losses[at : at + len(logits)] = nll(logits, targets[at : at + len(logits)])
                at += len(logits)
        means = [float(losses[i : i + BLOCK].mean(dtype=np.float64)) for i in range(0, len(losses), BLOCK)]
        return {"blocks": [round(m, 6) for m in means]}

    def _needles(self, point: Point) -> dict[str, Any]:
        from ..evals.decode import Decoder
        from ..evals.needles import ROOM, answers, haystack

        llm = self._switch(point)
        hay = haystack(llm, self.end - ROOM)
        with Decoder(llm) as decoder:
            for _ in self._told(decoder, list(hay.tokens), every=False):
                pass
            found = answers(llm, decoder, hay)
        loss = sum(a.loss for a in found) / len(found)
        return {"loss": round(loss, 4), "exact": sum(a.exact for a in found), "tokens": len(hay.tokens)}

    def _told(self, decoder: Any, tokens: Sequence[int], *, every: bool) -> Iterator[Any]:
        """decoder.logits, with progress over the whole sweep."""
        before = self.read

        def tell(done: int, _: int) -> None:
            self.read = before + done
            if self.progress:
                self.progress(self.read, self.total)

        yield from decoder.logits(tokens, every=every, progress=tell)


def _draw(found: Bands, path: Path) -> None:
    rows = ["perplexity", *(["needle"] if any(m.needle is not None for m in found.points) else [])]
    title = f"{found.model}, S = {found.scale:g}: the band's two bounds"
    figure, axes = style.grid(len(rows), 2, (9.6, 0.9 + 3.5 * len(rows)), title, sharey="row")
    shades = style.colours(found.methods)
    for row, what in zip(axes, rows, strict=True):
        for panel, moved, usual, other in zip(row, ("beta_fast", "beta_slow"), USUAL, USUAL[::-1], strict=True):
            for method in found.methods:
                curve = [m for m in found.curve(method, moved) if getattr(m, what) is not None]
                x = [getattr(m.point, moved) for m in curve]
                y = [getattr(m, what) for m in curve]
                if method == "none":
                    panel.axhline(y[0], color=shades[method], linewidth=1.2, linestyle="--", label="none")
                elif x:
                    panel.plot(x, y, color=shades[method], label=method, marker="o", markersize=4.5, linewidth=1.8)
            panel.set_xscale("log", base=2)
            style.plain_numbers(panel.xaxis)
            style.rule(panel, usual, f"usual, {usual:g}")
            fixed = "beta_slow" if moved == "beta_fast" else "beta_fast"
            greek = {"beta_fast": "alpha", "beta_slow": "beta"}[moved]
            style.name(panel, f"{fixed} = {other:g}", f"{moved} (turns; the paper's {greek})")
        words = {
            "perplexity": f"perplexity of {style.tokens(found.start)} to {style.tokens(found.end)}",
            "needle": "needles, nats a token",
        }
        row[0].set_ylabel(words[what], color=style.INK, fontsize=10, labelpad=5)
    style.key(axes[0][0])
    style.save(figure, path)
