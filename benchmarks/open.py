"""How fast a GGUF file opens: open_gguf against gguf.GGUFReader, which decodes the vocabulary too.

    python -m benchmarks.open [FILE.gguf]     (the Gemma file: about a minute, nearly all of it the reader's)

Both are asked for the same facts, which must agree. Fails under 1000x or over 5 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrrope_gguf import fetch
from mrrope_gguf.gguf.index import open_gguf

ROUNDS = 5
RESULTS = Path(__file__).parent / "results" / "open.json"


def ours(path: Path) -> dict[str, Any]:
    """Open with the index, with the values any verb needs, and every tensor's place."""
    with open_gguf(path) as index:
        tensors = [(t.name, t.dims, t.nbytes, index.data_start + t.offset) for t in index.tensors.values()]
        context = index.get(f"{index.arch}.context_length")
        return {"arch": index.arch, "context": context, "keys": list(index.kvs), "tensors": tensors}


def theirs(path: Path) -> dict[str, Any]:
    """The same facts from the gguf package."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    context = int(reader.fields[f"{arch}.context_length"].contents())
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    shapes = [(t.name, tuple(int(n) for n in t.shape), int(t.n_bytes), int(t.data_offset)) for t in reader.tensors]
    return {"arch": arch, "context": context, "keys": keys, "tensors": shapes}


def seconds(open_file: Callable[[Path], Any], path: Path) -> float:
    began = time.perf_counter()
    open_file(path)
    return time.perf_counter() - began


def memory(name: str, path: Path) -> float | None:
    """MiB by which opening `path` in a fresh process raises its peak; None where the system does not say."""
    if sys.platform != "linux":
        return None
    program = f"""
import sys
from pathlib import Path
import gguf
from benchmarks.open import {name}

def peak():  # KiB; ru_maxrss may be the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
{name}(Path(sys.argv[1]))
print((peak() - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch.fetch(fetch.GEMMA3)
    if ours(path) != theirs(path):  # the warm-up of both
        print("the two do not agree", file=sys.stderr)
        return 1
    times = [(seconds(ours, path), seconds(theirs, path)) for _ in range(ROUNDS)]
    fast, slow = (statistics.median(column) for column in zip(*times, strict=True))
    result = {"file": path.name, "open_gguf_s": fast, "GGUFReader_s": slow, "ratio": slow / fast}
    result |= {"open_gguf_MiB": memory("ours", path), "GGUFReader_MiB": memory("theirs", path)}
    print(f"{path.name}, median of {ROUNDS}")
    for label, took, mib in (
        ("open_gguf", fast, result["open_gguf_MiB"]),
        ("gguf.GGUFReader", slow, result["GGUFReader_MiB"]),
    ):
        print(f"{label:16} {took * 1e3:10.2f} ms" + ("" if mib is None else f" {mib:8.1f} MiB"))
    print(f"{'ratio':16} {slow / fast:10.0f} x")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if slow / fast >= 1000 and fast < 0.005 else 1


if __name__ == "__main__":
    sys.exit(main())
