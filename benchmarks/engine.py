"""Does the patch cost speed, and what does changing a table cost? Patched llama.cpp against the same one unpatched.

    python -m benchmarks.engine [FILE.gguf] [--rounds N] [--cached N] [--engine DIR] [--stock DIR]

On SmolLM2-135M: about 8 minutes on 2 cores, the first time with two builds before it. Both libraries come from the same
sdist by the recipe of `mrrope build`, the same compiler and flags, one without the patch (or from the folders given).
Each runs in a process of its own, one thread, turn and turn about: a ratio is the median over rounds of two CPU times
measured next to each other, which other programs on the machine disturb least. Fails under 0.99 of stock's speed, or
where setting a table takes over 1 % of the prefill of what is cached.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch

RESULTS = Path(__file__).parent / "results" / "engine.json"
PROMPT, BEFORE, GENERATED = 512, 128, 64  # tokens
AT_LEAST = 0.99  # of stock's speed
AT_MOST = 0.01  # of the prefill
F16, FLASH = 1, 1


def main() -> int:
    args = _arguments()
    engine, stock = args.engine or patched_library(), args.stock or stock_library()
    sides = {
        "stock": Side(stock, args.model),
        "patched": Side(engine, args.model),
        "patched, static table": Side(engine, args.model, scale=4.0),
    }
    check(sides)
    speeds = race(sides, args.rounds)
    for side in sides.values():
        side.close()
    cost = table_cost(engine, args.model, args.cached)
    report = {
        "file": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "rounds": args.rounds,
        "threads": 1,
        "speed": speeds,
        "table_set": cost,
    }
    show(report)
    RESULTS.parent.mkdir(exist_ok=True)
    if args.cached == 16384:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    ratios = [ratio for name in speeds["ratio"].values() for ratio in name.values()]
    return 0 if min(ratios) >= AT_LEAST and cost["share"] <= AT_MOST else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file (SmolLM2-135M)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cached", type=int, default=16384, help="tokens in the cache when the table is set")
    parser.add_argument("--engine", type=Path, help="the folder of a patched libllama")
    parser.add_argument("--stock", type=Path, help="the folder of an unpatched one, built with the same flags")
    args = parser.parse_args()
    args.model = args.model or fetch.fetch(fetch.SMOLLM2)
    return args


def patched_library() -> Path:
    from mrrope_gguf.engine.build import build

    return build(backend="cpu", server=False, say=print).lib


def stock_library() -> Path:
    """The library that build() would make if there were no patch; kept beside the engines."""
    from mrrope_gguf.engine import store
    from mrrope_gguf.engine.cmake import Recipe, compile_targets, configure
    from mrrope_gguf.engine.pins import PIN, pin
    from mrrope_gguf.engine.sdist import fetch_sdist, unpack
    from mrrope_gguf.engine.toolchain import default_jobs

    recipe, wanted = Recipe("cpu", server=False), pin(PIN)
    kept = store.engines_dir().with_name("benchmark-stock") / wanted.release
    if not (kept / "lib").is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        (kept / "tree").mkdir(parents=True)
        unpack(fetch_sdist(wanted, print), kept / "tree")
        print(f"compiling llama.cpp {wanted.commit[:9]} without the patch")
        configure(recipe, kept / "tree", kept / "build", wanted.commit[:9])
        compile_targets(recipe, kept / "build", default_jobs())
        (kept / "build" / "bin").rename(kept / "lib")
        for name in ("tree", "build"):
            shutil.rmtree(kept / name)
    return kept / "lib"


class Side:
    """One library in a process of its own, with a model open."""

    def __init__(self, lib: Path, model: Path, **settings: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_choose, initargs=(str(lib),))
        self.call(_open, model, **settings)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


def check(sides: dict[str, Side]) -> None:
    """Warm every side up; without a table the patched library answers as stock does, with one it does not."""
    answers = {name: side.call(_answer) for name, side in sides.items()}
    largest = max(map(abs, answers["stock"]))
    apart = {name: max(abs(a - b) for a, b in zip(answers["stock"], found, strict=True)) / largest
             for name, found in answers.items()}  # fmt: skip
    if apart["patched"] > 1e-5 or apart["patched, static table"] < 1e-3:
        raise SystemExit(f"the answers are not as they should be: {apart}")


def race(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Tokens per second of each side, and each one's speed as a part of stock's: medians over the rounds."""
    jobs: dict[str, tuple[Callable[[], float], int]] = {
        "prompt": (_prompt, PROMPT),
        "generation": (_generate, GENERATED),
    }
    seconds: dict[str, dict[str, list[float]]] = {job: {name: [] for name in sides} for job in jobs}
    names = list(sides)
    for turn in range(rounds):
        for job, (function, _) in jobs.items():
            for name in names[turn % 3 :] + names[: turn % 3]:
                seconds[job][name].append(sides[name].call(function))
    speed = {job: {name: jobs[job][1] / statistics.median(took) for name, took in found.items()}
             for job, found in seconds.items()}  # fmt: skip
    ratio = {job: {name: _ratio(found["stock"], took) for name, took in found.items() if name != "stock"}
             for job, found in seconds.items()}  # fmt: skip
    return {"tokens_per_s": speed, "ratio": ratio, "seconds": seconds}


def _ratio(stock: list[float], ours: list[float]) -> float:
    return statistics.median(theirs / took for theirs, took in zip(stock, ours, strict=True))


def table_cost(engine: Path, model: Path, cached: int) -> dict[str, Any]:
    """Seconds to prefill `cached` tokens and to set another table then: f16 cache, all cores."""
    side = Side(engine, model, n_ctx=cached + 8, threads=os.cpu_count() or 1)
    prefill, sets = side.call(_table_cost, cached)
    side.close()
    took = statistics.median(sets)
    return {"cached": cached, "prefill_s": prefill, "set_s": took, "all_set_s": sets, "share": took / prefill}


def show(report: dict[str, Any]) -> None:
    speeds = report["speed"]
    print(f"{report['file']}, 1 thread, median of {report['rounds']} rounds")
    print(f"{'tokens per second':26}{'prompt':>12}{'generation':>12}")
    for name in speeds["tokens_per_s"]["prompt"]:
        cells = [f"{speeds['tokens_per_s'][job][name]:.1f}" for job in ("prompt", "generation")]
        print(f"{name:26}{cells[0]:>12}{cells[1]:>12}")
    for name in speeds["ratio"]["prompt"]:
        cells = [f"{speeds['ratio'][job][name]:.4f}" for job in ("prompt", "generation")]
        print(f"{name + ' / stock':26}{cells[0]:>12}{cells[1]:>12}")
    cost = report["table_set"]
    print(f"\nllama_rope_table_set with {cost['cached']} tokens cached: {cost['set_s'] * 1e3:.0f} ms, ", end="")
    print(f"{100 * cost['share']:.2f} % of their prefill ({cost['prefill_s']:.1f} s)")


# -- what runs in the processes of the sides --

_held: dict[str, Any] = {}


def _choose(lib: str) -> None:
    """llama_cpp reads the variable when it is first imported, which is after this."""
    os.environ["LLAMA_CPP_LIB_PATH"] = lib


def _open(path: Path, n_ctx: int = 1024, threads: int = 1, scale: float = 0.0) -> None:
    import llama_cpp

    from mrrope_gguf.engine import capture

    _held["quiet"] = capture()
    _held["quiet"].__enter__()  # for good: llama.cpp logs whenever it reserves a graph
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = F16
    params.flash_attn_type = FLASH
    _held.update(api=llama_cpp, model=model, ctx=llama_cpp.llama_init_from_model(model, params))
    if scale:
        _set(scale)


def _set(scale: float) -> None:
    """SmolLM2's shape: 32 pairs, base 1e5, 8192 tokens. Another model's table differs in numbers, not in cost."""
    from mrrope_gguf import rope_table
    from mrrope_gguf.engine import set_table, table_size

    n_rot = 2 * table_size(_held["ctx"])
    set_table(_held["ctx"], rope_table("mrrope-pro", n_rot=n_rot, freq_base=1e5, n_ctx_orig=8192, scale=scale))


def _feed(n: int, at_a_time: int = 512) -> None:
    """Decode n more tokens after those held."""
    api = _held["api"]
    for start in range(0, n, at_a_time):
        count = min(at_a_time, n - start)
        tokens = (api.llama_token * count)(*(100 + 37 * (start + i) % 20000 for i in range(count)))
        if api.llama_decode(_held["ctx"], api.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")
    api.llama_synchronize(_held["ctx"])


def _clear() -> None:
    _held["api"].llama_memory_clear(_held["api"].llama_get_memory(_held["ctx"]), True)


def _answer() -> list[float]:
    """Logits after a prompt and a token."""
    _clear()
    _feed(PROMPT)
    _feed(1)
    vocab = _held["api"].llama_model_get_vocab(_held["model"])
    row = _held["api"].llama_get_logits_ith(_held["ctx"], -1)
    return list(ctypes.cast(row, ctypes.POINTER(ctypes.c_float))[: _held["api"].llama_vocab_n_tokens(vocab)])


def _timed(function: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    began = clock()
    function()
    return clock() - began


def _prompt() -> float:
    _clear()
    return _timed(lambda: _feed(PROMPT))


def _generate() -> float:
    _clear()
    _feed(BEFORE)
    return _timed(lambda: _feed(GENERATED, at_a_time=1))


def _table_cost(cached: int) -> tuple[float, list[float]]:
    _feed(64)  # warm
    _clear()
    prefill = _timed(lambda: _feed(cached), time.perf_counter)
    return prefill, [_timed(partial(_set, scale), time.perf_counter) for scale in (2.0, 3.0, 4.0, 2.0, 4.0)]


if __name__ == "__main__":
    sys.exit(main())
