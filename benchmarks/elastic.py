"""Elastic context measured: when to grow, by how much, and against every static table. docs/elastic.md says more.

    python -m benchmarks.elastic [--threads N] [WHAT ...]     (everything: hours on 2 cores)
    python -m benchmarks.elastic --table                       tables and pictures of what there is

WHAT is `ablation`, `final`, `gemma` or one run by its name (benchmarks/elastic_runs.py says how they are named).
Results go to benchmarks/results/elastic.jsonl, one line a run; a run that has one is not made again, so a command that
was interrupted is given again. Runs on the patched engine (`mrrope build`). Weights are widened to f16, which changes
no value and reads faster; keys and values in the cache are f16.
`--part 1/2` and `--part 2/2` beside each other with `--threads 1` use two cores better than one with two threads.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.elastic_plan import DEFAULT, GROUPS, OTHERS, PRO, STATIC
from benchmarks.elastic_report import Results, ablation, differences, drift, needles, perplexities, pictures
from benchmarks.elastic_runs import Session
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.paths import cache_dir

RESULTS = Path(__file__).parent / "results" / "elastic.jsonl"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def measure(whats: list[str], part: str, threads: int) -> None:
    """Make the runs that have no result yet."""
    index, parts = (int(n) for n in part.split("/"))
    chains = [chain for what in whats for chain in (GROUPS[what]() if what in GROUPS else [[what]])]
    folder = cache_dir() / "elastic"
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(RESULTS)
    session = None
    for run in (run for chain in chains[index - 1 :: parts] for run in chain):
        if run in log.runs():
            continue
        model = run.split("/")[1]
        if session is None or session.name != model:
            session = Session(model, log, folder, threads)
        session.run(run)


def report() -> str:
    """Every table, and every picture written into docs/images."""
    runs = RunLog(RESULTS).runs()
    smol = Results(runs, "smollm2", DEFAULT)
    gemma = Results(runs, "gemma3", DEFAULT)
    ways = ["none", DEFAULT, PRO, "truncate", *STATIC, *OTHERS]
    hays = tuple(key for key in smol.needles if key[0] == "noise" and key[2] > 8192)
    sections = {
        "Ablation": ablation(smol, hays=hays),
        "Perplexity, SmolLM2": perplexities(smol, ways),
        "Differences, SmolLM2": differences(smol, ways),
        "Needles, SmolLM2": needles(smol, ways),
        "Drift, SmolLM2": drift(smol),
        "Perplexity, Gemma 3": perplexities(gemma, ways),
        "Differences, Gemma 3": differences(gemma, ways),
        "Needles, Gemma 3": needles(gemma, ways),
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    shown = [*pictures(smol, ways, IMAGES, "elastic"), *pictures(gemma, ways, IMAGES, "elastic-gemma")]
    return "\n\n".join([*(f"### {name}\n\n{text}" for name, text in sections.items()), *(p.name for p in shown)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(GROUPS)}, or a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th chain of runs, from the I-th on")
    parser.add_argument("--table", action="store_true", help="show the results there are, measure nothing")
    args = parser.parse_args()
    if args.table:
        print(report())
    else:
        measure(args.what or list(GROUPS), args.part, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
