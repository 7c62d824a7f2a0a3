"""What `mrrope` takes with a model of 400 GB, against one of 4 GB with the same header and against the gguf package.

    python -m benchmarks.big     (as root on Linux: 5 minutes on idle cores; 1 GB of disk)

The models are sparse: 5003 tensors, 250,000 tokens and as many merges, 13 MB of header, and holes for weights. They lie
on loop-mounted ext4 (blocks are inserted), xfs and btrfs (blocks are shared), and once on an ext4 with every block
allocated, so that there are extents to move. Whole processes are timed; each model must come back byte for byte.
Fails where 400 GB takes over 1.5 times what 4 GB does, or over 64 MiB of memory beyond an idle interpreter.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.extend import loop_mounted
from tests import big_gguf
from tests.big_gguf import GB, MIB, Run, digest, measured

ROUNDS = 5
SIZES = (4 * GB, 400 * GB)
RESULTS = Path(__file__).parent / "results" / "big.json"
AT_MOST, MEMORY = 1.5, 64 * MIB
VERBS: dict[str, list[str]] = {
    "inspect": ["inspect"],
    "fit": ["fit"],
    "extend --in-place": ["extend", "--in-place", "--scale", "4"],
    "inspect, extended": ["inspect"],
    "revert": ["revert"],
}


def measure(place: Path, *, allocated: bool) -> dict[str, Any]:
    """Runs of every verb with each size, in turns; medians of seconds, the most memory."""
    runs: dict[str, dict[int, list[Run]]] = {verb: {size: [] for size in SIZES} for verb in VERBS}
    for _ in range(ROUNDS):
        for size in SIZES:
            path = big_gguf.write(place / "m.gguf", size)
            if allocated:
                fill(path)
            before = digest(path)
            for verb, command in VERBS.items():
                os.sync()
                run = measured(command[0], path, *command[1:])
                if run.code:
                    raise SystemExit(run.err)
                runs[verb][size].append(run)
            if digest(path) != before:
                raise SystemExit(f"{path} did not come back as it was")
            path.unlink()
    return {verb: summary(of) for verb, of in runs.items()}


def fill(path: Path) -> None:
    """Allocate every block of a file, so that holes become extents."""
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def summary(of: dict[int, list[Run]]) -> dict[str, Any]:
    seconds = {f"{size // GB} GB": statistics.median(run.seconds for run in runs) for size, runs in of.items()}
    last = of[SIZES[-1]]
    return {
        "seconds": seconds,
        "400 GB / 4 GB": seconds["400 GB"] / seconds["4 GB"],
        "read": max(run.read for run in last),
        "written": max(run.written for run in last),
        "memory": max(run.memory for run in last),
    }


def allocated_ext4(stack: ExitStack) -> Path | None:
    """An ext4 that can hold 400 GB, in a sparse image of which 0.2 GB are used."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    image, place = directory / "image", directory / "place"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(480 * GB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        return None
    stack.callback(lambda: subprocess.run(["umount", place], check=True))
    return place


PACKAGE = """
import sys, time
import gguf
began = time.perf_counter()
reader = gguf.GGUFReader(sys.argv[1])
seconds = time.perf_counter() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(len(reader.tensors), seconds, int(status["VmHWM"].split()[0]) * 1024)
"""
OURS = PACKAGE.replace("import gguf\n", "from mrrope_gguf.gguf.index import open_gguf\n").replace(
    "gguf.GGUFReader", "open_gguf"
)


def opened(program: str, path: Path) -> dict[str, float]:
    """Seconds and peak memory of opening a model in a process of its own."""
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    n, seconds, memory = run.stdout.split()
    if int(n) != 5003:
        raise SystemExit(f"{n} tensors were found")
    return {"seconds": float(seconds), "memory": int(memory)}


def readers(place: Path) -> dict[str, Any]:
    path = big_gguf.write(place / "m.gguf", SIZES[-1])
    ours = sorted((opened(OURS, path) for _ in range(ROUNDS)), key=lambda run: run["seconds"])
    found = {"open_gguf": ours[ROUNDS // 2], "GGUFReader": opened(PACKAGE, path)}
    path.unlink()
    return {**found, "ratio": found["GGUFReader"]["seconds"] / found["open_gguf"]["seconds"]}


def missed(results: dict[str, dict[str, Any]], idle: int) -> list[str]:
    out = []
    for place, verbs in results.items():
        for verb, found in verbs.items():
            if found["400 GB / 4 GB"] > AT_MOST:
                out.append(f"{verb} on {place}: {found['400 GB / 4 GB']:.2f} times what 4 GB takes")
            if found["memory"] - idle > MEMORY:
                out.append(f"{verb} on {place}: {(found['memory'] - idle) / MIB:.0f} MiB")
    return out


def main() -> int:
    load, idle = os.getloadavg()[0], measured().memory
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        places = {kind: loop_mounted(kind, stack) for kind in ("ext4", "xfs", "btrfs")}
        if places["ext4"] is None:
            return 1
        print("| where | verb | 4 GB | 400 GB | ratio | read | written | memory |\n|---|---|---|---|---|---|---|---|")
        for name, place in {**places, "ext4, allocated": allocated_ext4(stack)}.items():
            if place is None:
                continue
            results[name] = measure(place, allocated="allocated" in name)
            for verb, found in results[name].items():
                ms = [f"{seconds * 1e3:.0f} ms" for seconds in found["seconds"].values()]
                sizes = [f"{found[part] / 1e6:.1f} MB" for part in ("read", "written")]
                memory = f"{(found['memory'] - idle) / MIB:.0f} MiB"
                ratio = f"{found['400 GB / 4 GB']:.2f}"
                print(f"| {' | '.join([name, verb, *ms, ratio, *sizes, memory])} |", flush=True)
        opens = readers(places["ext4"])
    print(
        f"\nopening: {opens['open_gguf']['seconds'] * 1e3:.1f} ms against {opens['GGUFReader']['seconds']:.1f} s of "
        f"gguf.GGUFReader ({opens['ratio']:.0f} x), {opens['open_gguf']['memory'] / MIB:.0f} against "
        f"{opens['GGUFReader']['memory'] / MIB:.0f} MiB"
    )
    said = {"date": time.strftime("%Y-%m-%d"), "load average": load, "idle memory": idle, "places": results}
    said["opening"] = opens
    RESULTS.write_text(json.dumps(said, indent=1) + "\n")
    lines = missed(results, idle)
    print("\n".join(f"missed: {line}" for line in lines) or "all reached")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
