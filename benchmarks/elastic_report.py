"""The results of benchmarks.elastic as Markdown tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mrrope_gguf.evals.bootstrap import Interval, paired
from mrrope_gguf.plots import plot_intervals, plot_needles, plot_perplexity, plot_tradeoff

ABLATED = 12288  # tokens of the haystack and the end of the bucket that the ablation's picture shows

Runs = dict[str, dict[str, Any]]


class Results:
    """Runs of one model, by what they measured. `default` is the elastic way that the final comparison is about."""

    def __init__(self, runs: Runs, model: str, default: str) -> None:
        self.default = default
        self._blocks: dict[tuple[str, str, int], list[float]] = {}
        self.needles: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
        self.drift: dict[tuple[str, str, int], dict[str, Any]] = {}
        for name, run in runs.items():
            kind, of, *rest = name.split("/")
            if of != model:
                continue
            if kind == "ppl":
                self._blocks[rest[0], rest[1], int(rest[2])] = run["blocks"]
            elif kind == "needle":
                self.needles.setdefault((rest[0], int(rest[1]), int(rest[2])), {})[rest[3]] = run
            else:
                self.drift[rest[0], rest[1], int(rest[2])] = run

    def blocks(self, text: str, way: str, end: int) -> list[float] | None:
        """Block losses of one bucket. What was not run because it is `none`, bit for bit, is taken from there."""
        found = self._blocks.get((text, way, end))
        if found is None and (way.startswith("elastic") or way == "truncate"):
            return self._blocks.get((text, "none", end)) if end <= self.window else None
        return found

    @property
    def window(self) -> int:
        """n_ctx_orig: where the runs of elastic ways begin."""
        elastic = [end for _, way, end in self._blocks if way.startswith("elastic")]
        return min(elastic, default=4096) - 4096

    def texts(self) -> list[str]:
        return sorted({text for text, _, _ in self._blocks})

    def ends(self) -> list[int]:
        return sorted({end for _, _, end in self._blocks})

    def ways(self, prefix: str = "") -> list[str]:
        return list(dict.fromkeys(way for _, way, _ in self._blocks if way.startswith(prefix)))

    def perplexity(self, text: str, way: str, end: int) -> float | None:
        blocks = self.blocks(text, way, end)
        return None if blocks is None else math.exp(float(np.mean(blocks)))

    def difference(self, way: str, end: int, texts: Iterable[str]) -> tuple[Interval, int] | None:
        """The default way's loss minus this way's in one bucket, over the texts that have both; how many they are."""
        pairs = [(self.blocks(t, self.default, end), self.blocks(t, way, end)) for t in texts]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not both:
            return None
        return paired([a for a, _ in both], [b for _, b in both]), len(both)


def short(way: str) -> str:
    """A way as tables show it.

    >>> short("elastic,method=uni,step=1.189207,room=1.33,t=1")
    'elastic uni, step 1.19, head-room 1.33'
    >>> short("static,method=pro,scale=4")
    'static pro, S = 4'
    """
    kind, *rest = way.split(",")
    options = dict(option.split("=") for option in rest)
    if kind == "static":
        return f"static {options['method']}, S = {float(options['scale']):.3g}"
    if kind != "elastic":
        return kind
    step = options["step"]
    words = f"step {step} tokens" if step[0] == "+" else f"step {float(step):.3g}"
    words = f"elastic {options['method']}, {words}, head-room {float(options['room']):.3g}"
    return words if options["t"] == "1" else f"{words}, temperature x {options['t']}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def span(end: int) -> str:
    return f"{(end - 4096) // 1024}-{end // 1024}K"


def ablation(results: Results, text: str = "britannica", hays: tuple[tuple[str, int, int], ...] = ()) -> str:
    """Every way with its perplexity past the window on one text, and its needles: mean answer NLL (exact of ten)."""
    ends = [end for end in results.ends() if results.window < end <= 2 * results.window]
    head = ["", *(f"perplexity {span(end)}" for end in ends)]
    head += [f"needles {hay} {length // 1024}K, seed {seed}" for hay, seed, length in hays]
    ways = list(dict.fromkeys([*results.ways(), *(w for key in hays for w in results.needles.get(key, ()))]))
    rows = []
    for way in sorted(ways):
        cells = [number(results.perplexity(text, way, end)) for end in ends]
        cells += [_needle(results.needles.get(key, {}).get(way)) for key in hays]
        if any(cells):
            rows.append([_named(results, way), *cells])
    return table(head, rows)


def _named(results: Results, way: str) -> str:
    return f"**{short(way)}**" if way == results.default else short(way)


def _needle(run: dict[str, Any] | None) -> str:
    return "" if run is None else f"{run['loss']:.2f} ({run['exact']})"


def perplexities(results: Results, ways: list[str]) -> str:
    """Perplexity of each text, way and bucket."""
    ends = results.ends()
    rows = []
    for text in results.texts():
        for way in ways:
            cells = [number(results.perplexity(text, way, end)) for end in ends]
            if any(cells):
                rows.append([text, _named(results, way), *cells])
    return table(["text", "", *map(span, ends)], rows)


def differences(results: Results, ways: list[str]) -> str:
    """The default way's perplexity against each other's, in per cent, with 95 % intervals and the number of texts."""
    ends = results.ends()
    rows = []
    for way in ways:
        cells = [_percent(results.difference(way, end, results.texts())) for end in ends]
        if way != results.default and any(cells):
            rows.append([short(way), *cells])
    return table(["elastic against", *map(span, ends)], rows)


def _percent(found: tuple[Interval, int] | None) -> str:
    if found is None:
        return ""
    mean, low, high = (100 * math.expm1(x) for x in found[0])
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}] ({found[1]})"


def needles(results: Results, ways: list[str], seeds: tuple[int, ...] = (42,)) -> str:
    """Mean answer NLL (exact of ten) by haystack and length."""
    keys = sorted((key for key in results.needles if key[1] in seeds), key=lambda key: (key[0], key[2], key[1]))
    rows = []
    for way in ways:
        cells = [_needle(_held(results, key, way)) for key in keys]
        if any(cells):
            rows.append([_named(results, way), *cells])
    return table(["", *(f"{hay} {length // 1024}K" for hay, _, length in keys)], rows)


def _held(results: Results, key: tuple[str, int, int], way: str) -> dict[str, Any] | None:
    """A needle run; an elastic one within the window is `none`'s."""
    runs = results.needles[key]
    return runs.get("none") if way.startswith("elastic") and key[2] <= results.window else runs.get(way)


def drift(results: Results) -> str:
    """What turning costs, by the keys' type."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in results.drift))
    rows = []
    for how, n in dict.fromkeys((how, n) for _, how, n in results.drift):
        words = f"S from 1 to 4 in {n}" if how == "stages" else f"S to 1.58, then {n} times to 1 and back"
        runs = [results.drift.get((kind, how, n)) for kind in kinds]
        rows.append([words, *("" if r is None else f"{r['keys']:.2g} ({r['loss']:.3f})" for r in runs)])
    return table(["turns", *(f"{kind}: keys (loss)" for kind in kinds)], rows)


def pictures(results: Results, ways: list[str], folder: Path, name: str) -> list[Path]:
    """Write a picture into `folder` of everything there are results for."""
    drawn: dict[str, tuple[Callable[..., None], Any, int]] = {
        "perplexity": (partial(plot_perplexity, log2=True), _lines(results, ways), results.window),
        "difference": (
            plot_intervals,
            _intervals(results, [way for way in ways if "linear" not in way]),
            results.window,
        ),
        "ablation": (plot_tradeoff, _tradeoff(results), ABLATED),
        "needles-noise": (plot_needles, _needle_lines(results, ways, "noise"), results.window),
    }
    made = []
    for what, (plot, data, tokens) in drawn.items():
        if data:
            made.append(folder / f"{name}-{what}.png")
            plot(data, tokens, made[-1])
    return made


def _lines(results: Results, ways: list[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Perplexity over all texts, {way: (middle of the bucket, perplexity)}; a bucket counts where every text has it."""
    texts, series = results.texts(), {}
    for way in ways:
        found = {end: [results.blocks(t, way, end) for t in texts] for end in results.ends()}
        means = {end: [np.mean(b) for b in blocks if b is not None] for end, blocks in found.items()}
        points = {end: math.exp(float(np.mean(m))) for end, m in means.items() if texts and len(m) == len(texts)}
        if points:
            series[short(way)] = ([end - 2048 for end in points], list(points.values()))
    return series


def _intervals(results: Results, ways: list[str]) -> dict[str, dict[int, Interval]]:
    series = {}
    for way in ways:
        found = {end - 2048: results.difference(way, end, results.texts()) for end in results.ends()}
        points = {at: difference[0] for at, difference in found.items() if difference is not None}
        if points and way not in (results.default, "none"):
            series[short(way)] = points
    return series


def _tradeoff(results: Results) -> dict[str, tuple[float, float]]:
    points = {}
    for way, run in results.needles.get(("noise", 42, ABLATED), {}).items():
        perplexity = results.perplexity("britannica", way, ABLATED)
        if perplexity is not None:
            points[short(way)] = (perplexity, run["loss"])
    return points


def _needle_lines(results: Results, ways: list[str], hay: str) -> dict[str, tuple[list[int], list[float]]]:
    lines = {}
    for way in ways:
        runs = {key[2]: _held(results, key, way) for key in sorted(results.needles) if key[:2] == (hay, 42)}
        points = {length: run["loss"] for length, run in runs.items() if run is not None}
        if len(points) > 1:
            lines[short(way)] = (list(points), list(points.values()))
    return lines
