"""What growing costs: the time of every stage on the way to the full table, against the prefill it interrupts.

    python -m benchmarks.elastic_cost [--tokens N] [--threads N]

SmolLM2-135M Q4_1 extended to 32768 tokens, its weights widened to f16, f16 cache, plain attention, random tokens; about
6 minutes on 2 cores. The engine's own log says what each stage took (rotation of all cached keys and a new graph), so
both times are of one run and of one load of the machine. Fails at 2 % of the prefill or more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.elastic_models import MODELS, widened
from mrrope_gguf.engine import capture, loaded_library, set_elastic
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load

RESULTS = Path(__file__).parent / "results" / "elastic_cost.json"
STAGE = re.compile(r"rope_elastic_update: (\d+) positions, scale \S+ -> ([\d.]+), ([\d.]+) ms")
AT_MOST = 0.02
WARM = 512  # tokens read before the clock starts
CHUNK = 4096  # cells that the engine rotates at once


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_cost")
    parser.add_argument("--tokens", type=int, default=24576, help="past 23170 every stage was passed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = extend(widened(MODELS["smollm2"].resource), Path(folder) / "m.gguf", scale=4, method="mrrope-uni").path
        report = measure(path, args.tokens, args.threads)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return int(report["share"] >= AT_MOST)


def measure(path: Path, n_tokens: int, threads: int) -> dict[str, Any]:
    """Seconds of the prefill and of its stages; the memory that a rotation takes for itself."""
    llm: Any = load(path, elastic=True, flash_attn=False, n_threads=threads, n_threads_batch=threads)
    tokens = [10 + i * 7919 % 40000 for i in range(n_tokens)]
    scratch = rotation(llm, tokens[:CHUNK])
    with capture() as log, Decoder(llm) as decoder:
        read(decoder, tokens[:WARM])
        began = time.perf_counter()
        read(decoder, tokens[WARM:])
        seconds = time.perf_counter() - began
        found = [(int(n), float(scale), float(ms)) for n, scale, ms in STAGE.findall(log.text)]
    spent = sum(ms for _, _, ms in found) / 1000
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "engine": loaded_library().commit,
        "threads": threads,
        "tokens": n_tokens,
        "stages": [{"tokens": n, "scale": scale, "ms": ms} for n, scale, ms in found],
        "prefill_seconds": round(seconds, 1),
        "stages_seconds": round(spent, 3),
        "share": round(spent / seconds, 5),
        "rotation_MiB": scratch,
    }


def rotation(llm: Any, tokens: list[int]) -> int:
    """MiB by which the process grows while the keys of all `tokens` are rotated to the full table, and back."""
    with Decoder(llm) as decoder:
        read(decoder, tokens)
        before = resident("VmRSS")
        set_elastic(llm, False)
        set_elastic(llm, True)
        return resident("VmHWM") - before


def read(decoder: Decoder, tokens: list[int]) -> None:
    for _ in decoder.logits(tokens, every=False):
        pass


def resident(what: str) -> int:
    """MiB, as Linux counts them."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
