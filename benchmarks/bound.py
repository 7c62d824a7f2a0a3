"""The bound scan against the same scan in numpy: the cosines of a block of positions, summed, until a sum is negative.

    python -m benchmarks.bound     (about 20 seconds, nearly all of them numpy's)

Both must find the same position. Fails under 10x for a scan of 100,000 positions or more.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mrrope_gguf.bound import bound, min_base
from mrrope_gguf.tables import pair_angles, rope_table

ROUNDS = 5
BLOCK = 128  # positions numpy takes at once; the fastest of 64..65536 here
LEAST = 10.0
RESULTS = Path(__file__).parent / "results" / "bound.json"

LLAMA2 = {"n_rot": 128, "freq_base": 1e4, "n_ctx_orig": 4096}
QWEN25 = {"n_rot": 128, "freq_base": 1e6, "n_ctx_orig": 32768}


def cases() -> list[tuple[str, list[float], int]]:
    """(name, angles, limit)."""
    return [
        ("Llama 2, mrrope-pro, S = 4", table("mrrope-pro", 4, LLAMA2), 1 << 20),
        ("Qwen2.5, mrrope-pro, S = 16", table("mrrope-pro", 16, QWEN25), 1 << 20),
        ("Qwen2.5, linear, S = 16", table("linear", 16, QWEN25), 1 << 20),
        ("base 1e12, no bound to 1M", pair_angles(128, 1e12), 1 << 20),
    ]


def table(method: str, scale: float, facts: dict[str, Any]) -> list[float]:
    return rope_table(method, scale=scale, **facts).theta


def numpy_bound(theta: list[float], limit: int) -> int | None:
    angles = np.array(theta)
    for first in range(1, limit + 1, BLOCK):
        m = np.arange(first, min(first + BLOCK, limit + 1), dtype=np.float64)
        below = np.flatnonzero(np.cos(m[:, None] * angles).sum(axis=1) < 0.0)
        if below.size:
            return first + int(below[0])
    return None


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, theta: list[float], limit: int) -> dict[str, Any]:
    """Warm both up, hold their answers against one another, then time them in turn."""
    answer = bound(theta, limit)
    if answer != numpy_bound(theta, limit):
        raise SystemExit(f"{name}: the two do not agree")
    times = [(seconds(lambda: bound(theta, limit)), seconds(lambda: numpy_bound(theta, limit))) for _ in range(ROUNDS)]
    ours, numpys = (statistics.median(column) for column in zip(*times, strict=True))
    positions = answer or limit
    return {"case": name, "positions": positions, "ours_s": ours, "numpy_s": numpys, "ratio": numpys / ours}


def main() -> int:
    rows = [measure(*case) for case in cases()]
    print(f"first m with sum cos(m theta_i) < 0, median of {ROUNDS}")
    print(f"{'case':30} {'positions':>10} {'ours ms':>9} {'numpy ms':>9} {'ratio':>7} {'M/s':>7}")
    for r in rows:
        speed = r["positions"] / r["ours_s"] / 1e6
        numbers = f"{r['ours_s'] * 1e3:9.3f} {r['numpy_s'] * 1e3:9.1f} {r['ratio']:6.0f}x {speed:7.0f}"
        print(f"{r['case']:30} {r['positions']:10} {numbers}")
    inverse = {f"min_base({n}, 128)": seconds(lambda n=n: min_base(n, 128)) for n in (4096, 131072, 1 << 20)}  # type: ignore[misc]
    for call, took in inverse.items():
        print(f"{call:30} {took * 1e3:20.1f} ms")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"scans": rows, "min_base_s": inverse}, indent=1) + "\n")
    return 0 if all(r["ratio"] >= LEAST for r in rows if r["positions"] >= 100_000) else 1


if __name__ == "__main__":
    sys.exit(main())
