"""Does a model, with so much context, fit in this machine's memory? Answered from the header, before anything loads."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mrrope_gguf.compute_buffer import Dims, dims
from mrrope_gguf.errors import Refused
from mrrope_gguf.facts import read_facts
from mrrope_gguf.gguf.index import open_gguf, open_split
from mrrope_gguf.gguf.source import require_no_journal
from mrrope_gguf.kvcache import PAD, Cache, Memory, Setting, memory
from mrrope_gguf.machine import MachineMemory, machine_memory
from mrrope_gguf.text import printable

MOST = 1 << 26
BAR = 40
F32 = 4


@dataclass(frozen=True)
class Model:
    """What a header says about memory: enough to answer for any context parameters without opening the file again."""

    path: Path
    arch: str
    n_ctx_train: int
    weights: int
    memory: Memory
    dims: Dims

    def needs(self, setting: Setting) -> tuple[list[Cache], int, int]:
        """The caches, the bytes of the compute buffers, and the bytes of everything, weights too."""
        caches = self.memory.caches(setting)
        output = setting.n_seq_max * self.dims.n_vocab * F32
        compute = self.dims.graph(setting, caches) + self.dims.work(setting, caches) + output
        return caches, compute, self.weights + compute + sum(cache.nbytes for cache in caches)

    def largest(self, setting: Setting, available: int) -> int | None:
        """The most tokens (a multiple of 256) that fit in `available` bytes; 0 if not even 256, None without limit.

        Raises Refused where the model cannot have caches of these types.
        """
        low, high = 0, MOST // PAD
        if self.needs(replace(setting, n_ctx=MOST))[2] <= available:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.needs(replace(setting, n_ctx=middle * PAD))[2] <= available
            low, high = (middle, high) if fits else (low, middle)
        return low * PAD


@dataclass(frozen=True)
class Fit:
    """The answer. All sizes are bytes; `largest` holds the most tokens that fit by cache type, None for no limit."""

    model: Model
    setting: Setting
    caches: tuple[Cache, ...]
    compute: int
    total: int
    machine: MachineMemory | None
    largest: dict[str, int | None]

    @property
    def weights(self) -> int:
        return self.model.weights

    @property
    def kv(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def fits(self) -> bool:
        return self.machine is None or self.total <= self.machine.available

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and names, as `mrrope fit --json` prints them."""
        caches = [{"name": c.name, "cells": c.cells, "layers": c.n_layer, "k": c.k, "v": c.v} for c in self.caches]
        return {
            "file": str(self.model.path),
            "architecture": self.model.arch,
            "n_ctx": self.setting.n_ctx,
            "n_ctx_train": self.model.n_ctx_train,
            "type_k": self.setting.type_k,
            "type_v": self.setting.type_v,
            "n_ubatch": self.setting.ubatch,
            "flash_attn": self.setting.flash_attn,
            "weights": self.weights,
            "kv": self.kv,
            "caches": caches,
            "compute": self.compute,
            "total": self.total,
            "memory_total": self.machine and self.machine.total,
            "memory_available": self.machine and self.machine.available,
            "fits": self.fits,
            "largest_n_ctx": self.largest,
        }

    def render(self) -> str:
        """A table for a terminal: what takes how much, whether it fits, and how far one could go."""
        s, rows = self.setting, [("weights", self.weights, "mapped from the file")]
        for cache in filter(lambda cache: cache.n_layer, self.caches):
            rows.append((_NAMES[cache.name], cache.nbytes, self._detail(cache)))
        rows.append(("compute", self.compute, f"estimate, {s.ubatch} tokens at a time"))
        lines = [f"{printable(self.model.path.name)}  {self.model.arch}, {s.n_ctx} tokens", ""]
        lines += [f"  {name:<15}{size(n):>10}  {_bar(n, self.total)}  {detail}" for name, n, detail in rows]
        lines += [f"  {'total':<15}{size(self.total):>10}", "", self._verdict()]
        return "\n".join([*lines, *self._advice()])

    def _detail(self, cache: Cache) -> str:
        if cache.name in ("recurrent", "compressor"):
            return f"{cache.n_layer} layers, whatever the context"
        types = self.setting.type_k if cache.v == 0 else f"{self.setting.type_k}/{self.setting.type_v}"
        return f"{cache.n_layer} layers x {cache.cells} cells, {types}"

    def _verdict(self) -> str:
        if self.machine is None:
            return "This system does not say how much memory it has."
        where = "this container" if self.machine.limit else "this machine"
        have = f"{size(self.machine.available)} of {size(self.machine.total)} free on {where}"
        return f"Fits: {have}." if self.fits else f"Does not fit: {have}."

    def _advice(self) -> list[str]:
        lines = [f"  largest context with {name:<5} cache: {_tokens(n)}" for name, n in self.largest.items()]
        if self.setting.n_ctx > self.model.n_ctx_train:
            lines.append(
                f"  the file's own context is {self.model.n_ctx_train} tokens: `mrrope extend` makes it longer"
            )
        return lines


_NAMES = {
    "kv": "KV cache",
    "global": "KV global",
    "sliding": "KV sliding",
    "indexer": "KV indexer",
    "csa": "KV 4:1",
    "hca": "KV 128:1",
    "recurrent": "state",
    "compressor": "state",
}


def fit(
    path: str | os.PathLike[str],
    n_ctx: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    *,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_seq_max: int = 1,
    flash_attn: bool = True,
    swa_full: bool = False,
    kv_unified: bool = False,
) -> Fit:
    """What a model takes in memory with a context of n_ctx tokens (None or 0: the file's own), all on the CPU's side.

    The caches are what llama.cpp allocates, byte for byte; weights are the tensors' bytes of all shards; the compute
    buffer is an estimate (see compute_buffer). Types are ggml's names: f16, q8_0, q4_0, ...
    Raises BadFile, FileTrouble, Refused where the model cannot have such a cache, ValueError for a negative n_ctx.
    """
    if n_ctx is not None and n_ctx < 0:
        raise ValueError(f"n_ctx must be 0 (the file's own) or more, got {n_ctx}")
    model = read_model(path)
    setting = Setting(
        n_ctx or model.n_ctx_train, type_k, type_v, n_batch, n_ubatch, n_seq_max, flash_attn, swa_full, kv_unified
    )
    caches, compute, total = model.needs(setting)
    machine = machine_memory()
    return Fit(model, setting, tuple(caches), compute, total, machine, _largest(model, setting, machine))


def read_model(path: str | os.PathLike[str]) -> Model:
    """Read the header of a model, and for their sizes those of its other shards."""
    require_no_journal(Path(path))
    shards = open_split(path)
    weights = 0
    for shard in shards:
        with open_gguf(shard) as index:
            weights += sum(tensor.nbytes for tensor in index.tensors.values())
    with open_gguf(shards[0]) as index:
        n_ctx_train = read_facts(index).n_ctx_train  # its checks too: nothing below loops over an unchecked number
        return Model(shards[0], index.arch, n_ctx_train, weights, memory(index), dims(index))


def _largest(model: Model, setting: Setting, machine: MachineMemory | None) -> dict[str, int | None]:
    """Per cache type; a type the model cannot have is left out."""
    found: dict[str, int | None] = {}
    for name in ("f16", "q8_0"):
        try:
            # a quantised V needs flash attention
            wanted = replace(setting, type_k=name, type_v=name, flash_attn=setting.flash_attn or name != "f16")
            if machine:
                found[name] = model.largest(wanted, machine.available)
        except Refused:
            continue
    return found


def size(n: int) -> str:
    """Bytes for people.

    >>> size(123456789)
    '117.7 MiB'
    """
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n / 1024:.1f} KiB"


def _bar(n: int, total: int) -> str:
    return f"{'#' * round(BAR * n / max(total, 1)):<{BAR}}"


def _tokens(n: int | None) -> str:
    if n is None:
        return "as long as you like"
    return f"{n} tokens" if n else "none fits"
