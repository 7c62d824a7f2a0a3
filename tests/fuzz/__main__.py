"""`python -m tests.fuzz [TARGET...] [--seconds N] [--into DIR]`: fuzz for as long as wanted, say what came of it.

Without targets, all of them, as many at once as there are cores. Inputs that are new lie in DIR/TARGET-found
afterwards, what broke a target as DIR/crash-*; without DIR, in a folder that is named.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import native_targets, python_runs
from tests.fuzz.native_targets import CORPUS, SOURCES, Outcome
from tests.fuzz.python_targets import TARGETS


def fuzz(name: str, seconds: int, folder: Path) -> Outcome:
    if name in TARGETS:
        return python_runs.run(name, seconds, folder)
    engine = native_targets.libfuzzer() or native_targets.plain()
    if engine is None:
        raise SystemExit("no compiler with sanitizers: `apt-get install clang`")
    program = native_targets.build(name, engine, folder)
    return native_targets.run(name, program, seconds, folder, [CORPUS / name])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join([*SOURCES, *TARGETS])}")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    names = args.targets or [*SOURCES, *TARGETS]
    if unknown := set(names) - {*SOURCES, *TARGETS}:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    folder = args.into or Path(tempfile.mkdtemp(prefix="mrrope-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.seconds} s for each of {', '.join(names)}; finds go to {folder}", flush=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        runs = {name: pool.submit(fuzz, name, args.seconds, folder) for name in names}
        for name, run in runs.items():
            done = run.result()
            (folder / f"{name}.log").write_text(done.log)
            words = "clean" if done.returncode == 0 else f"broken, see {folder}/{name}.log"
            print(f"{name}: {done.executions} executions, {done.coverage} edges, {done.features} features: {words}")
    return max(run.result().returncode != 0 for run in runs.values())


if __name__ == "__main__":
    sys.exit(main())
