"""How far each method carries the tiny retriever of tests/data past its window of 256 tokens.

    python -m benchmarks.tiny_retriever [--seeds N] [--threads N]

For each method and each S of 2, 4, 8 and 16: needles at 11 depths of each length, N texts of each, in noise; share of
numbers recalled exactly (greedy) and mean loss of the true number's tokens, in nats. Prints the table of
docs/tiny-model.md. Needs the patched engine; about 5 minutes on one thread.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mrrope_gguf.evals import trie
from mrrope_gguf.evals.grid import needle_grid
from mrrope_gguf.evals.host import Host
from mrrope_gguf.evals.ways import Way, parse

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "data" / "retriever-256.gguf"
SCALES = (2, 4, 8, 16)
STATIC = "linear,ntk,yarn,mrrope-uni,mrrope-pro"
ELASTIC = "elastic:yarn,elastic:mrrope-uni,elastic:mrrope-pro"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = tuple(i / 10 for i in range(11))
GENERATED = 7  # tokens of an answer at most

Scores = dict[int, tuple[float, float]]  # length: share exact, mean loss in nats


def needle_scores(llm: Any, lengths: Sequence[int], seeds: int) -> Scores:
    """Share of needles recalled exactly, and mean loss of the answer, at each length in tokens."""
    cells = [cell for seed in range(seeds) for cell in needle_grid(llm, lengths, DEPTHS, generate=GENERATED, seed=seed)]
    found: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for cell, result in zip(cells, trie.run(llm, [cell.prompt(GENERATED) for cell in cells]), strict=True):
        said = llm.detokenize(list(result.generated)).decode(errors="replace")
        found[cell.length].append((cell.value in said, sum(result.losses) / len(result.losses)))
    return {n: (sum(e for e, _ in each) / len(each), sum(x for _, x in each) / len(each)) for n, each in found.items()}


def measured(seeds: int, threads: int) -> Iterator[tuple[Way, Scores]]:
    """Each way and its scores up to the length its S is meant for."""
    with Host(MODEL, n_ctx=LENGTHS[-1] + 64, n_threads=threads) as host:
        for scale, names in ((1, "none"), *((s, ways) for ways in (STATIC, ELASTIC) for s in SCALES)):
            far = host.n_ctx_orig * scale if scale > 1 else LENGTHS[-1]
            for way in parse(names, float(scale)):
                yield way, needle_scores(host.switch(way), [n for n in LENGTHS if n <= far], seeds)


def line(way: Way, scores: Scores) -> str:
    """A row of the table."""
    cells = [f"{scores[n][0]:.0%} {scores[n][1]:.2f}" if n in scores else "" for n in LENGTHS]
    name = f"elastic:{way.method}" if way.kind == "elastic" else way.name
    return f"| {name} | {way.scale:g} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_retriever")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| method | S | " + " | ".join(map(str, LENGTHS)) + " |\n" + "|---" * (len(LENGTHS) + 2) + "|")
    for way, scores in measured(args.seeds, args.threads):
        print(line(way, scores), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
