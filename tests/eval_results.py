"""Results files with known numbers: a model of 1024 tokens up to 4096, made up so that the report must say it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("none", "truncate", "yarn", "mrrope-uni", "elastic")
N_CTX = 1024
LENGTHS, DEPTHS = (512, 1024, 2048, 4096), (0, 25, 50, 75, 100)
EVIL = "\x1b[31m</td><script>alert(1)</script>![x](http://evil.example/x.png)|`$\\frac$"
# Mean loss over that of the text itself, in the window and past it.
LOSS = {
    "none": (0.0, 3.0),
    "truncate": (0.0, 0.10),
    "yarn": (0.02, 0.02),
    "mrrope-uni": (0.02, 0.021),
    "elastic": (0.0, 0.3),
}


def head(**other: Any) -> dict[str, Any]:
    ways = {way: {"kind": "elastic" if way == "elastic" else "static", "method": way, "scale": 4} for way in WAYS}
    model = {"name": "Toy <1>", "sha256": "ab" * 32, "n_ctx_orig": N_CTX, "arch": "llama"}
    settings = {"n_threads": 2, "flash_attn": False, "seed": 42}
    return {
        "run": "#head", "version": 1, "model": model, "engine": "patched", "scale": 4, "ways": ways, "texts": {},
        "settings": settings, **other,
    }  # fmt: skip


def losses(text: int, way: str, n_blocks: int = 16) -> list[float]:
    """Blocks that share most of their noise, as readings of one text do; their way's own part has mean 0."""
    shared = np.random.default_rng(text).normal(2.5 + 0.2 * text, 0.3, n_blocks)
    own = np.random.default_rng([text, list(LOSS).index(way)]).normal(0, 0.004, n_blocks)
    inside = np.arange(n_blocks) < N_CTX // 256
    own -= np.where(inside, own[inside].mean(), own[~inside].mean())
    if way in ("none", "truncate"):
        own[inside] = 0  # the same model, the same window
    return [float(x) for x in shared + own + np.where(inside, *LOSS[way])]


def ppl(text: str, way: str, blocks: Iterable[float], start: int = 0, task: str = "ppl") -> dict[str, Any]:
    values = list(blocks)
    end = start + 256 * len(values)
    return {
        "run": f"{task}/{text}/{way}/{start}-{end}", "task": task, "text": text, "way": way, "start": start,
        "end": end, "blocks": values,
    }  # fmt: skip


def answer(task: str, way: str, length: int, sample: str, score: float, **other: Any) -> dict[str, Any]:
    facts = {"task": task, "way": way, "length": length, "depth": None, "seed": 42, "tokens": length}
    said = {"exact": score == 1, "rouge1": score, "loss": 2 - 2 * score, "said": "it is 7", "expected": ["7"]}
    return {"run": f"{task}/{way}/{length}/{sample}", **facts, "score": score, **said, **other}


def needles(task: str = "needle") -> list[dict[str, Any]]:
    """none fails past its window, truncate finds what is in the last window, the others all but one depth at 4096."""
    found = []
    for way in WAYS:
        for length in LENGTHS:
            for depth in DEPTHS:
                seen = length <= N_CTX or (length * (100 - depth) / 100 < N_CTX if way == "truncate" else way != "none")
                score = float(seen and not (way == "yarn" and length == 4096 and depth < 75))
                for i in range(2):
                    cell = answer(task, way, length, f"{depth}-{i}", score, depth=depth)
                    found.append({**cell, "said": EVIL} if way == "elastic" else cell)
    return found


def whole() -> list[dict[str, Any]]:
    """Three texts, every way, in-window KL, a needle grid and a task that the model cannot do in its window."""
    lines = [head()]
    for i, text in enumerate(("one", "two", "three")):
        for way in WAYS:
            lines.append(ppl(text, way, losses(i, way)))
            lines.append(ppl(text, way, [LOSS[way][0] ** 2 + 0.001 * k for k in range(4)], task="kl"))
    hard = [answer("ruler/vt", w, n, str(i), 0.2 * (i % 2)) for w in WAYS for n in LENGTHS for i in range(6)]
    return [*lines, *needles(), *hard]


def write(directory: Path, lines: Iterable[Mapping[str, Any]], tail: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return directory
