"""How fast rope and nll are: against numpy, torch where it is installed, and the speed of copying the same bytes.

    python -m benchmarks.kernels     (half a minute, 1.5 GB of memory)

Every contender runs once in each round, so that all see the same machine; ratios are of medians over the rounds.
Fails if nll is not 5 times as fast as numpy, or rope not at 60 % of copying, each on one thread.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrrope_gguf.kernels import nll, rope, simd_levels
from mrrope_gguf.tables import RopeTable, rope_table

ROUNDS = 11
RESULTS = Path(__file__).parent / "results" / "kernels.json"
NLL_SHAPE = (512, 151936)  # Qwen2.5's vocabulary
ROPE_SHAPE = (4096, 32, 128)
NLL_FLOOR, ROPE_FLOOR = 5.0, 0.6

Contenders = dict[str, Callable[[], object]]


def medians(contenders: Contenders) -> dict[str, float]:
    """Seconds of each, the median over ROUNDS rounds in which each runs once; one round more warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + ROUNDS):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(took[1:]) for name, took in times.items()}


# --- nll ----------------------------------------------------------------------------------------------------------


def nll_numpy(logits: NDArray[Any], targets: NDArray[np.int64]) -> NDArray[Any]:
    """The log-sum-exp that one writes in numpy."""
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return np.asarray(log_sum - logits[np.arange(len(logits)), targets])


def nll_torch(logits: NDArray[Any], targets: NDArray[np.int64], n_threads: int) -> Callable[[], object]:
    import torch

    x, y = torch.from_numpy(logits), torch.from_numpy(targets)

    def run() -> object:
        torch.set_num_threads(n_threads)
        return torch.nn.functional.cross_entropy(x, y, reduction="none")

    return run


def bench_nll(cpus: int, with_torch: bool) -> dict[str, Any]:
    """Seconds of each contender, how many times numpy's speed each has, and the largest error of ours."""
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal(NLL_SHAPE, dtype=np.float32)
    targets = rng.integers(0, NLL_SHAPE[1], NLL_SHAPE[0])
    contenders: Contenders = {
        "numpy": lambda: nll_numpy(logits, targets),
        "mrrope, 1 thread": lambda: nll(logits, targets, n_threads=1),
        f"mrrope, {cpus} threads": lambda: nll(logits, targets, n_threads=cpus),
    }
    if with_torch:
        contenders["torch, 1 thread"] = nll_torch(logits, targets, 1)
        contenders[f"torch, {cpus} threads"] = nll_torch(logits, targets, cpus)
    seconds = medians(contenders)
    exact = nll_numpy(logits[:32].astype(np.float64), targets[:32])
    return {
        "shape": NLL_SHAPE,
        "seconds": seconds,
        "times numpy": {name: seconds["numpy"] / took for name, took in seconds.items()},
        "largest error": float(np.abs(nll(logits[:32], targets[:32]) - exact).max()),
        "largest error of numpy": float(np.abs(nll_numpy(logits[:32], targets[:32]) - exact).max()),
    }


# --- rope ---------------------------------------------------------------------------------------------------------


def rope_numpy(x: NDArray[Any], positions: NDArray[np.int64], table: RopeTable, mode: str) -> NDArray[Any]:
    """The rotation that one writes in numpy, in the type of x."""
    angles = positions[:, None, None] * np.array(table.theta)
    c = (table.attn_factor * np.cos(angles)).astype(x.dtype)
    s = (table.attn_factor * np.sin(angles)).astype(x.dtype)
    a, b = (x[..., ::2], x[..., 1::2]) if mode == "norm" else np.split(x, 2, axis=-1)
    turned = (a * c - b * s, b * c + a * s)
    return np.stack(turned, axis=-1).reshape(x.shape) if mode == "norm" else np.concatenate(turned, axis=-1)


def rope_torch(x: NDArray[Any], positions: NDArray[np.int64], table: RopeTable) -> Callable[[], object]:
    """The "neox" rotation of the transformers package: x * cos + rotate_half(x) * sin, on one thread."""
    import torch

    tensor, theta, places = torch.from_numpy(x), torch.tensor(table.theta), torch.from_numpy(positions)

    def run() -> object:
        torch.set_num_threads(1)
        angles = places[:, None, None] * torch.cat((theta, theta))
        c, s = ((table.attn_factor * f(angles)).to(tensor.dtype) for f in (torch.cos, torch.sin))
        a, b = tensor.chunk(2, dim=-1)
        return tensor * c + torch.cat((-b, a), dim=-1) * s

    return run


def bench_rope(dtype: str, mode: str, with_torch: bool) -> dict[str, Any]:
    """Seconds of each contender on one thread, and rope's speed as a share of copying the same bytes."""
    table = rope_table("mrrope-uni", n_rot=ROPE_SHAPE[2], freq_base=1e6, n_ctx_orig=32768, scale=4)
    positions = np.arange(ROPE_SHAPE[0])
    source: NDArray[Any] = np.random.default_rng(0).standard_normal(ROPE_SHAPE, dtype=np.float32).astype(dtype)
    out, inside = rope(source, positions, table, mode), source.copy()
    exact = rope_numpy(source[:256].astype(np.float64), positions[:256], table, mode)
    error = float(np.abs(out[:256] - exact).max())
    words = inside.view(np.uint64)
    contenders: Contenders = {
        "copy": lambda: ctypes.memmove(out.ctypes.data, source.ctypes.data, source.nbytes),
        "rope": lambda: rope(source, positions, table, mode, out=out, n_threads=1),
        "flip bits in place": lambda: np.invert(words, out=words),
        "rope in place": lambda: rope(inside, positions, table, mode, out=inside, n_threads=1),
        "numpy": lambda: rope_numpy(source, positions, table, mode),
    }
    if with_torch and mode == "neox":
        contenders["torch"] = rope_torch(source, positions, table)
    with np.errstate(all="ignore"):  # bits that were flipped may be anything
        seconds = medians(contenders)
    return {
        "dtype": dtype,
        "mode": mode,
        "seconds": seconds,
        "share of copy": seconds["copy"] / seconds["rope"],
        "share of copy in place": seconds["flip bits in place"] / seconds["rope in place"],
        "copy GB/s": 2 * source.nbytes / seconds["copy"] / 1e9,
        "times numpy": seconds["numpy"] / seconds["rope"],
        "times torch": seconds["torch"] / seconds["rope"] if "torch" in seconds else None,
        "largest error": error,
    }


# --- report -------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    print(f"nll of {result['nll']['shape']}, {result['simd']}, median of {ROUNDS}")
    for name, took in result["nll"]["seconds"].items():
        print(f"  {name:20} {took * 1e3:8.1f} ms {result['nll']['times numpy'][name]:6.1f} x numpy")
    print(f"rope of {ROPE_SHAPE}, one thread; copy reads and writes the same bytes")
    print("                  copy GB/s  share of copy  in place  x numpy  x torch")
    for row in result["rope"]:
        torch = "" if row["times torch"] is None else f"{row['times torch']:8.1f}"
        share, inside = f"{row['share of copy']:.0%}", f"{row['share of copy in place']:.0%}"
        print(
            f"  {row['dtype']} {row['mode']:5} {row['copy GB/s']:10.1f} {share:>14} {inside:>9}"
            f" {row['times numpy']:8.1f} {torch}"
        )


def main() -> int:
    cpus, with_torch = os.cpu_count() or 1, importlib.util.find_spec("torch") is not None
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {cpus} CPUs",
        "simd": simd_levels()[0],
        "nll": bench_nll(cpus, with_torch),
        "rope": [bench_rope(dtype, mode, with_torch) for dtype in ("float32", "float16") for mode in ("norm", "neox")],
    }
    show(result)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    shares = [row[share] for row in result["rope"] for share in ("share of copy", "share of copy in place")]
    return 0 if result["nll"]["times numpy"]["mrrope, 1 thread"] >= NLL_FLOOR and min(shares) >= ROPE_FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
