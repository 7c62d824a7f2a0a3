"""`mrrope extend`, whole process, against gguf_new_metadata (the gguf package's script) and against cp + fsync.

    python -m benchmarks.extend [FILE.gguf] [DIRECTORY ...]     (the Gemma file: some minutes, most of it the script's)

Runs in a directory that cannot share blocks and, as root on Linux, on loop-mounted xfs and btrfs, which can; or in the
directories given. Every run starts after a sync and ends with the file on the disk (but for the script, which calls no
fsync). Each result is checked: tensors the same, and what extend wrote reverts to the original.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch, revert
from mrrope_gguf.gguf.copy import BLOCK, clone_range
from mrrope_gguf.gguf.index import open_gguf

ROUNDS = 5
RESULTS = Path(__file__).parent / "results" / "extend.json"
AT_LEAST = 50.0  # times faster than gguf_new_metadata
AT_MOST = 1.3  # times cp + fsync, where blocks cannot be shared
MILLISECONDS = 100.0  # whole process, where they can


# compiled Python is kept, as pip leaves it for users, whatever the caller's environment says
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def extend(src: Path, dst: Path) -> None:
    mrrope = Path(sys.executable).with_name("mrrope")
    subprocess.run([mrrope, "extend", src, dst, "--scale", "4"], check=True, capture_output=True, env=ENVIRONMENT)


def new_metadata(src: Path, dst: Path) -> None:
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--general-name", "longer", src, dst]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=ENVIRONMENT)


def cp(src: Path, dst: Path) -> None:
    never = ["--reflink=never"] if sys.platform == "linux" else []
    subprocess.run(["cp", *never, src, dst], check=True)
    fd = os.open(dst, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)


def seconds(run: Callable[[Path, Path], None], src: Path, dst: Path) -> float:
    """One run into a file that is not there yet, with no writing left over from the one before."""
    dst.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    run(src, dst)
    return time.perf_counter() - start


def data_sha256(path: Path) -> str:
    """Of all tensors' data, in the order of the original's names."""
    digest = hashlib.sha256()
    with open_gguf(path) as index:
        for name in sorted(index.tensors.keys() - {"rope_freqs.weight", "rope_factors_long.weight"}):
            digest.update(index.tensor_bytes(name))
    return digest.hexdigest()


def shares_blocks(directory: Path) -> bool:
    with tempfile.TemporaryFile(dir=directory) as a, tempfile.TemporaryFile(dir=directory) as b:
        a.write(bytes(BLOCK))
        a.flush()
        return clone_range(a.fileno(), 0, BLOCK, b.fileno(), 0)


def measure(model: Path, directory: Path, name: str) -> dict[str, Any]:
    """Medians of ROUNDS rounds, in which every contestant runs once; one round before them, without the slow
    script, warms the caches."""
    src = directory / "source.gguf"
    shutil.copyfile(model, src)
    contestants = {"extend": extend, "cp + fsync": cp, "gguf_new_metadata": new_metadata}
    times: dict[str, list[float]] = {who: [] for who in contestants}
    for round_number in range(ROUNDS + 1):
        for who, run in contestants.items():
            if not round_number and run is new_metadata:
                continue
            took = seconds(run, src, directory / f"{run.__name__}.gguf")
            if round_number:
                times[who].append(took)
    check(src, directory)
    medians = {who: statistics.median(values) for who, values in times.items()}
    return {
        "place": name,
        "reflink": shares_blocks(directory),
        "seconds": medians,
        "all": times,
        "faster than gguf_new_metadata": medians["gguf_new_metadata"] / medians["extend"],
        "times cp + fsync": medians["extend"] / medians["cp + fsync"],
    }


def check(src: Path, directory: Path) -> None:
    wanted = data_sha256(src)
    for run in (extend, cp, new_metadata):
        if data_sha256(directory / f"{run.__name__}.gguf") != wanted:
            raise SystemExit(f"{run.__name__} changed the tensors")
    revert(directory / "extend.gguf", directory / "back.gguf", force=True)
    if fetch.sha256(directory / "back.gguf") != fetch.sha256(src):
        raise SystemExit("what extend wrote does not revert to the original")


@contextmanager
def places(given: list[str]) -> Iterator[list[tuple[Path, str]]]:
    """Directories to run in, and what to call them; made ones are gone afterwards."""
    with ExitStack() as stack:
        if given:
            made = [stack.enter_context(tempfile.TemporaryDirectory(dir=d)) for d in given]
            yield [(Path(m), d) for m, d in zip(made, given, strict=True)]
            return
        out = [(Path(stack.enter_context(tempfile.TemporaryDirectory())), "temporary directory")]
        for kind in ("xfs", "btrfs"):
            place = loop_mounted(kind, stack)
            if place is not None:
                out.append((place, f"{kind}, loop-mounted"))
        yield out


def loop_mounted(kind: str, stack: ExitStack) -> Path | None:
    """A fresh file system in a sparse image; None, saying why, where it cannot be."""
    if sys.platform != "linux" or os.geteuid() or shutil.which(f"mkfs.{kind}") is None:
        print(f"{kind}: left out (needs Linux, root and mkfs.{kind})")
        return None
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    image, place = directory / "image", directory / "place"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(4 << 30)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode:
        print(f"{kind}: left out (it cannot be mounted here)")
        return None
    stack.callback(lambda: subprocess.run(["umount", place], check=True))
    return place


def verdict(results: list[dict[str, Any]]) -> list[str]:
    """What was not reached; of the places that share blocks, the fastest counts."""
    missed = []
    for result in results:
        if result["faster than gguf_new_metadata"] < AT_LEAST:
            missed.append(f"{result['place']}: under {AT_LEAST:g}x gguf_new_metadata")
        if not result["reflink"] and result["times cp + fsync"] > AT_MOST:
            missed.append(f"{result['place']}: over {AT_MOST:g}x cp + fsync")
    shared = [result["seconds"]["extend"] * 1e3 for result in results if result["reflink"]]
    if shared and min(shared) > MILLISECONDS:
        missed.append(f"over {MILLISECONDS:g} ms where blocks are shared")
    return missed


def main() -> int:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch.fetch(fetch.GEMMA3)
    print(f"{model.name}, {model.stat().st_size / 1e6:.0f} MB, median of {ROUNDS}\n")
    print("| where | extend | cp + fsync | gguf_new_metadata | faster than that | times cp + fsync |")
    print("|---|---|---|---|---|---|")
    results = []
    with places(sys.argv[2:]) as directories:
        for directory, name in directories:
            result = measure(model, directory, name)
            results.append(result)
            ms = {who: f"{value * 1e3:.0f} ms" for who, value in result["seconds"].items()}
            print(
                f"| {name}{', reflink' if result['reflink'] else ''} | {ms['extend']} | {ms['cp + fsync']} "
                f"| {ms['gguf_new_metadata']} | {result['faster than gguf_new_metadata']:.0f}x "
                f"| {result['times cp + fsync']:.2f} |",
                flush=True,
            )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"file": model.name, "results": results}, indent=1) + "\n")
    missed = verdict(results)
    print("\n" + "\n".join(f"missed: {line}" for line in missed) if missed else "\nall reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
