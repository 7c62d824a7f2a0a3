"""Sparse GGUF files as large as anyone's: a real header of megabytes, and holes where the weights would be.

`write` makes one on any file system that has holes, in a second and a few megabytes; `measured` runs `mrrope` on one
in a process of its own and counts what it read, wrote and held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests import gguf_bytes as g

GB = 10**9
MIB = 1 << 20
N_LAYER = 500
N_VOCAB = 250_000
N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM = 8192, 64, 8, 128
N_CTX = 8192
ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
DENSE = ("ffn_gate", "ffn_up", "ffn_down")
F16 = 1


@cache
def records(arch: str, n_layer: int = N_LAYER, n_vocab: int = N_VOCAB) -> tuple[bytes, ...]:
    """The metadata of a model with a vocabulary of n_vocab tokens and as many merges."""
    words = b"".join(g.string(f"\u2581token{i}") for i in range(n_vocab))
    merges = b"".join(g.string(f"tok{i} en{i}") for i in range(n_vocab))
    numbers = {
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "block_count": n_layer,
        "feed_forward_length": 28672,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "rope.dimension_count": HEAD_DIM,
    }
    reals = {"rope.freq_base": 5e5, "attention.layer_norm_rms_epsilon": 1e-5}
    return (
        g.kv("general.architecture", g.STRING, g.string(arch)),
        g.kv("general.name", g.STRING, g.string("Big")),
        *(g.kv(f"{arch}.{key}", g.U32, g.u32(value)) for key, value in numbers.items()),
        *(g.kv(f"{arch}.{key}", g.F32, struct.pack("<f", value)) for key, value in reals.items()),
        g.kv("tokenizer.ggml.model", g.STRING, g.string("gpt2")),
        g.kv("tokenizer.ggml.tokens", g.ARRAY, g.array(g.STRING, n_vocab, words)),
        g.kv("tokenizer.ggml.token_type", g.ARRAY, g.array(g.I32, n_vocab, struct.pack("<i", 1) * n_vocab)),
        g.kv("tokenizer.ggml.merges", g.ARRAY, g.array(g.STRING, n_vocab, merges)),
    )


def shapes(arch: str, size: int, n_layer: int = N_LAYER) -> dict[str, tuple[int, int]]:
    """Tensors of f16 by name: 5003 of equal size for a llama of experts; of a dense qwen2 q and k are what they are."""
    parts = ATTENTION + (EXPERTS if arch == "llama" else DENSE)
    layers = [f"blk.{i}.{part}.weight" for i in range(n_layer) for part in parts]
    names = ["token_embd.weight", "output_norm.weight", "output.weight", *layers]
    own = {} if arch == "llama" else {"attn_q": N_HEAD * HEAD_DIM, "attn_k": N_HEAD_KV * HEAD_DIM}
    rest = size // (2 * N_EMBD) - n_layer * sum(own.values())
    rows = rest // (len(names) - n_layer * len(own))
    return {name: (N_EMBD, own.get(name.split(".")[-2], rows)) for name in names}


def write(path: Path, size: int, arch: str = "llama", n_layer: int = N_LAYER) -> Path:
    """A model of about `size` bytes. The header is as long whatever the size: only numbers in it differ."""
    return _sparse(path, records(arch, n_layer), shapes(arch, size, n_layer))


def write_split(folder: Path, count: int, size: int) -> list[Path]:
    """The same in `count` shards, a llama; the first holds the metadata alone, as llama-gguf-split can make it."""
    every, paths = list(shapes("llama", size).items()), []
    for i in range(count):
        kvs = [
            *(records("llama") if i == 0 else ()),
            g.kv("split.no", g.U16, struct.pack("<H", i)),
            g.kv("split.count", g.U16, struct.pack("<H", count)),
            g.kv("split.tensors.count", g.I32, struct.pack("<i", len(every))),
        ]
        paths.append(
            _sparse(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf", kvs, dict(every[i - 1 :: count - 1] if i else []))
        )
    return paths


def _sparse(path: Path, kvs: Sequence[bytes], tensors: dict[str, tuple[int, int]]) -> Path:
    """Every tensor a hole, but for its name at the beginning of each 97th."""
    infos, marks, at = [], {}, 0
    for i, (name, (columns, rows)) in enumerate(tensors.items()):
        infos.append(g.tensor(name, (columns, rows), F16, at))
        if i % 97 == 0:
            marks[at] = name.encode()
        at += 2 * columns * rows
    body = g.pad(g.head(len(tensors), len(kvs)) + b"".join(kvs) + b"".join(infos))
    with open(path, "wb") as file:
        file.write(body)
        file.truncate(len(body) + at)
        for offset, mark in marks.items():
            file.seek(len(body) + offset)
            file.write(mark)
    return path


def digest(path: Path) -> str:
    """sha256 of all that is written in a file, with its place, and of the file's size: holes are not read."""
    found, end = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but holes from here on
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            _add(found, os.pread(file.fileno(), at - start, start), start)
    found.update(str(end).encode())
    return found.hexdigest()


def _add(found: Any, data: bytes, start: int) -> None:
    """Block by block, zeros left out: a file system may keep some where another has a hole."""
    for i in range(0, len(data), 4096):
        if any(block := data[i : i + 4096]):
            found.update(f"{start + i} ".encode() + block)


@dataclass(frozen=True)
class Run:
    """What a process did. Memory is the peak RSS (bytes), pages of mapped files among it, and `faults` how many times a
    page was brought in; `read` and `written` are bytes through system calls, an in-kernel copy counted as both."""

    code: int
    out: str
    err: str
    memory: int
    read: int
    written: int
    faults: int
    seconds: float


def measured(*args: str | os.PathLike[str], timeout: float = 120) -> Run:
    """`mrrope` with these arguments in a process of its own; without any, an interpreter that does nothing."""
    command = [sys.executable, "-c", _PROGRAM, *(os.fspath(arg) for arg in args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    *said, counts = done.stdout.rstrip("\n").split("\n")
    found = json.loads(counts)
    return Run(err=done.stderr, out="\n".join(said), **found)


_PROGRAM = """
import json, resource, sys, time
began, code = time.perf_counter(), 0
if sys.argv[1:]:
    from mrrope_gguf.cli import main
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
seconds = time.perf_counter() - began
# VmHWM, not ru_maxrss, which may be the parent's
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
io = dict(line.split(": ") for line in open("/proc/self/io"))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "code": code or 0, "memory": int(status["VmHWM"].split()[0]) * 1024, "read": int(io["rchar"]),
    "written": int(io["wchar"]), "faults": usage.ru_minflt + usage.ru_majflt, "seconds": seconds,
}))
"""
