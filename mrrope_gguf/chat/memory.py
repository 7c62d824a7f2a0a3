"""Whether a chat fits in memory, and if it does not, what would: answered from the header, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..engine.devices import Gpu
from ..errors import DoesNotFit, Refused
from ..fit import Model, size
from ..kvcache import Setting
from ..machine import MachineMemory
from ..text import printable
from .options import AUTO, Options

# what a process takes besides: Python, the vocabulary, the text itself, buffers of threads
RESERVE = 256 << 20
_STEP = 256


@dataclass(frozen=True)
class Estimate:
    """Bytes a chat takes: `total` of them, `host` in the machine's memory and `device` on GPUs.

    `untouched`: what llama-cpp-python asks for and never uses, which only a limit of address space counts.
    """

    weights: int
    kv: int
    compute: int
    host: int
    device: int
    untouched: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute

    def __str__(self) -> str:
        parts = f"weights {size(self.weights)} + KV cache {size(self.kv)} + compute {size(self.compute)}"
        return f"{parts} = {size(self.total)}"


@dataclass(frozen=True)
class Way:
    """A change of options that fits: as flags, and what it amounts to."""

    flags: str
    words: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Room:
    """What there is: the machine's memory (None: unknown), its GPUs, and the layers a model has."""

    machine: MachineMemory | None
    gpus: Sequence[Gpu]
    n_layer: int

    def layers_on_gpu(self, options: Options, model: Model, n_ctx: int) -> int:
        """-ngl as a number: with auto as many layers as fit on the GPUs, 0 where there are none."""
        if not self.gpus:
            return 0
        if options.gpu_layers != AUTO:
            return min(options.gpu_layers, self.n_layer + 1)
        free = sum(gpu.free for gpu in self.gpus)
        for n in range(self.n_layer + 1, 0, -1):
            if self.estimate(options, model, n_ctx, n).device <= free:
                return n
        return 0

    def estimate(self, options: Options, model: Model, n_ctx: int, n_gpu: int) -> Estimate:
        """What `n_ctx` tokens take with the last `n_gpu` layers on the GPU: the output counts as one more layer.

        Raises Refused where the model cannot have such a cache.
        """
        caches, compute, _ = model.needs(setting(options, n_ctx))
        kv = sum(cache.nbytes for cache in caches)
        layers = self.n_layer + 1
        device = (model.weights * n_gpu // layers + kv * min(n_gpu, self.n_layer) // self.n_layer) if n_gpu else 0
        whole = model.weights + kv + compute
        untouched = 4 * options.n_batch * n_ctx  # its batch has room for n_ctx sequences a token
        return Estimate(model.weights, kv, compute, whole - device, device + compute if n_gpu else 0, untouched)

    def fits(self, found: Estimate) -> bool:
        """Whether this much is free. Where the system does not say, it is taken to be."""
        if found.device > sum(gpu.free for gpu in self.gpus):
            return False
        return self.machine is None or self.needs(found) <= self.machine.available

    def needs(self, found: Estimate) -> int:
        """Bytes that must be free in the machine's memory."""
        untouched = found.untouched if self.machine and self.machine.mapped else 0
        return found.host + RESERVE + untouched


def setting(options: Options, n_ctx: int) -> Setting:
    """llama.cpp's parameters as `fit` takes them."""
    return Setting(
        n_ctx=n_ctx, type_k=options.type_k, type_v=options.type_v, n_batch=options.n_batch,
        n_ubatch=options.n_ubatch, flash_attn=options.flash_attn,
    )  # fmt: skip


def ways(room: Room, options: Options, model: Model, n_ctx: int, need: int) -> list[Way]:
    """What would fit, the mildest change first: fewer layers on the GPU, a q8_0 cache, a smaller context, both.

    A context holds `need` tokens at least. Empty where nothing helps.
    """
    found: list[Way] = []
    n_gpu = room.layers_on_gpu(options, model, n_ctx)
    for n in range(n_gpu - 1, -1, -1):
        if room.fits(room.estimate(options, model, n_ctx, n)):
            found.append(Way(f"-ngl {n}", f"{n} of {room.n_layer} layers on the GPU", {"gpu_layers": n}))
            break
    for types, words in _caches(options):
        changed = replace(options, **types)
        try:
            if types and room.fits(room.estimate(changed, model, n_ctx, room.layers_on_gpu(changed, model, n_ctx))):
                found.append(Way(_flags(types), f"a {words} cache", types))
            elif largest := _largest(room, changed, model, n_ctx, need):
                flags = " ".join(filter(None, [f"-c {largest}", _flags(types)]))
                with_cache = f" with a {words} cache" if types else ""
                found.append(Way(flags, f"{largest} tokens of context{with_cache}", {"n_ctx": largest, **types}))
        except Refused:  # a cache this model cannot have
            continue
    return sorted(found, key=lambda way: "n_ctx" in way.changes)


def does_not_fit(name: str, n_ctx: int, found: Estimate, room: Room, there: Sequence[Way]) -> DoesNotFit:
    """The error, with every way out."""
    where = f"{found}; it needs {size(room.needs(found))} here with its surroundings"
    if room.machine:
        where += f", and {size(room.machine.available)} of {size(room.machine.total)} are free"
    if found.device:
        where += f"; {size(found.device)} on {', '.join(printable(gpu.name) for gpu in room.gpus)}, where "
        where += f"{size(sum(gpu.free for gpu in room.gpus))} are free"
    fix = ", or ".join(way.flags for way in there)
    return DoesNotFit(
        f"{name}: {n_ctx} tokens of context do not fit in memory",
        why=where,
        fix=fix or "close other programs, take a smaller model or quantisation, or a shorter document",
    )


def _caches(options: Options) -> Iterator[tuple[dict[str, Any], str]]:
    yield {}, ""
    if {options.type_k, options.type_v} & {"f32", "f16", "bf16"}:
        # a quantised V needs flash attention
        flash = {} if options.flash_attn else {"flash_attn": True}
        yield {"type_k": "q8_0", "type_v": "q8_0", **flash}, "q8_0"


def _flags(types: dict[str, Any]) -> str:
    flash = " -fa on" if "flash_attn" in types else ""
    return f"-ctk {types['type_k']} -ctv {types['type_v']}{flash}" if types else ""


def _largest(room: Room, options: Options, model: Model, n_ctx: int, need: int) -> int:
    """The most tokens (a multiple of 256) that fit, at least `need` and fewer than n_ctx; 0 if there are none."""
    low, high = -(-need // _STEP), -(-n_ctx // _STEP)

    def fits(blocks: int) -> bool:
        n = blocks * _STEP
        return room.fits(room.estimate(options, model, n, room.layers_on_gpu(options, model, n)))

    if low >= high or not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * _STEP
