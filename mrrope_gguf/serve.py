"""`mrrope serve`: the patched llama-server with the flags that a file asks for, and what is said before it starts.

`plan` decides everything from the header and touches no network: the command, the memory it takes, who will reach it.
`serve_net` looks at addresses, `serve_run` runs the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .engine.programs import Program
from .errors import DoesNotFit, Refused
from .export import Model, read
from .facts import obstacle
from .fit import Model as FitModel
from .fit import read_model, size
from .kvcache import Setting
from .machine import MachineMemory
from .serve_net import is_loopback, url_of
from .text import printable

METHODS = ("mrrope-uni", "mrrope-pro")
SLOTS = 4  # llama-server's own number where none is given, all in one memory
RESERVE = 256 << 20  # bytes a server takes besides: its code, the vocabulary, requests
CACHE_RAM = 8192  # MiB, llama-server's own limit for conversations that are put away

# llama-server's flags that are serve's own: given after `--` they would contradict what was estimated and said
_OURS = {
    "MODEL": ("-m", "--model", "-hf", "-hfr", "--hf-repo", "-mu", "--model-url", "-dr", "--docker-repo"),
    "-c": ("-c", "--ctx-size"),
    "-ctk": ("-ctk", "--cache-type-k"),
    "-ctv": ("-ctv", "--cache-type-v"),
    "-np": ("-np", "--parallel"),
    "-kvu": ("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"),
    "-ngl": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "-b": ("-b", "--batch-size"),
    "-ub": ("-ub", "--ubatch-size"),
    "-fa": ("-fa", "--flash-attn"),
    "-cram": ("-cram", "--cache-ram"),
    "--rpc": ("--rpc",),
    "--host": ("--host",),
    "--port": ("--port",),
    "--method": ("--rope-scaling",),
    "--scale": ("--rope-scale", "--rope-freq-scale"),
    "--elastic or --static": ("--rope-elastic",),
}
_VERBOSITY = ("-v", "--verbose", "--log-verbose", "-lv", "--verbosity", "--log-verbosity")


@dataclass(frozen=True)
class Wish:
    """What was asked for, by llama.cpp's names. None is llama-server's own default, `n_ctx` 0 all that the file has.

    `extra`: further arguments for llama-server. `force`: start it though memory will not do.
    """

    path: Path
    n_ctx: int = 0
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "on"
    n_slots: int | None = None
    unified: bool | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    cache_ram: int | None = None
    method: str | None = None
    scale: float | None = None
    elastic: bool | None = None
    n_gpu_layers: str | None = None
    threads: int | None = None
    threads_batch: int | None = None
    rpc: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    page: bool = True
    verbose: bool = False
    force: bool = False
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """`command` starts the server in the environment `env`; `url` is where it answers; `lines` say what will run."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    lines: tuple[str, ...]


def plan(wish: Wish, program: Program, machine: MachineMemory | None, env: Mapping[str, str] = os.environ) -> Plan:
    """How `program` serves what `wish` names, on a machine with so much memory (None: it does not tell).

    Raises Refused for contradictions and for a context the file does not have, DoesNotFit with what would fit,
    BadFile, FileTrouble.
    """
    _check_extra(wish.extra)
    model = read(wish.path)
    table = _Table.of(model, wish)
    slots = SLOTS if wish.n_slots is None else wish.n_slots
    unified = wish.n_slots is None if wish.unified is None else wish.unified
    n_ctx = _context(model, wish, table, 1 if unified else slots)
    setting = Setting(
        n_ctx, wish.type_k, wish.type_v, wish.n_batch, wish.n_ubatch, slots, wish.flash_attn != "off",
        kv_unified=unified,
    )  # fmt: skip
    memory, cache_ram = _memory(wish, setting, machine, elsewhere=_elsewhere(wish, program))
    _require_slots(setting)
    command = [str(program.path), "-m", str(model.path), *_context_flags(setting, wish), *table.flags()]
    command += [*_place_flags(wish), *(["--cache-ram", str(cache_ram)] if cache_ram is not None else [])]
    command += _alias(model, wish, env)
    command += _network_flags(wish, program, env)
    scheme = "https" if "--ssl-cert-file" in wish.extra or env.get("LLAMA_ARG_SSL_CERT_FILE") else "http"
    prefix = _after("--api-prefix", wish.extra) or env.get("LLAMA_ARG_API_PREFIX", "")
    url = url_of(wish.host, wish.port, scheme) + prefix
    shared = "that share them" if unified and slots > 1 else f"of {setting.cells} tokens"
    lines = [
        f"model   {model.name}: {n_ctx} tokens, {slots} slot{'s' * (slots != 1)} {shared}",
        f"table   {table.said(model)}",
        f"memory  {memory}",
        *_notes(model, wish, program),
        *_exposure(wish, scheme, env),
    ]
    return Plan((*command, *wish.extra), _environment(env), url, tuple(lines))


@dataclass(frozen=True)
class _Table:
    """The rope table that will run: the file's, one that the flags make, or none (`method` is "")."""

    method: str = ""
    scale: float = 1.0
    elastic: bool = False
    flagged: bool = False  # made by flags, for a file that was not extended
    n_ctx: int = 0

    @classmethod
    def of(cls, model: Model, wish: Wish) -> _Table:
        if wish.elastic and model.facts.arch.static_only:
            arch = model.facts.arch.name
            raise Refused(
                f"{model.name}: no elastic context for architecture '{arch}'",
                why="its cached keys cannot be rotated once more",
                fix="leave --elastic out: the table is static",
            )
        if model.stored is None:
            return cls._made(model, wish)
        stored = model.stored
        method, scale = printable(stored.table.method), stored.table.scale
        if wish.method or wish.scale:
            raise Refused(
                f"{model.name}: --method and --scale are for a file as it came",
                why=f"this one holds a table: {method}, S = {scale:g}",
                fix="leave them out; `mrrope revert` gives the original back",
            )
        elastic = stored.elastic if wish.elastic is None else wish.elastic
        return cls(method, scale, elastic, n_ctx=model.facts.n_ctx_train)

    @classmethod
    def _made(cls, model: Model, wish: Wish) -> _Table:
        facts = model.facts
        if not wish.method and wish.scale is None:
            if wish.elastic:
                fix = "--scale 4, or `mrrope extend` once"
                raise Refused(f"{model.name}: --elastic without a table", why="the file is not extended", fix=fix)
            return cls(n_ctx=facts.n_ctx_train)
        if hindrance := obstacle(facts, model.name):
            raise hindrance
        if facts.existing_scaling is not None:
            raise Refused(
                f"{model.name}: its RoPE was trained with a scaling of its own ({facts.existing_scaling.kind})",
                why="a table from flags would come on top of it",
                fix="`mrrope extend` says what can be done with this file",
            )
        scale = wish.scale or wish.n_ctx / facts.n_ctx_train
        if not 1 < scale < 1e6:
            raise Refused(
                f"{model.name}: S = {scale:g} stretches nothing",
                why=f"the file has {facts.n_ctx_train} tokens, and -c is {wish.n_ctx}",
                fix="--scale 4, or a -c past the file's context",
            )
        elastic = wish.elastic is not False and not facts.arch.static_only
        return cls(wish.method or METHODS[0], scale, elastic, True, int(facts.n_ctx_train * scale + 0.5))

    def flags(self) -> list[str]:
        if not self.method:
            return []
        named = ["--rope-scaling", self.method, "--rope-scale", f"{self.scale!r}"] if self.flagged else []
        return [*named, "--rope-elastic", "on" if self.elastic else "off"]

    def said(self, model: Model) -> str:
        if not self.method:
            return "none: the file is not extended"
        if self.elastic:
            grows = f"S grows from 1 to {self.scale:g} with the longest conversation"
            return f"{self.method}, elastic: the original model up to {model.facts.n_ctx_orig} tokens, then {grows}"
        return f"{self.method}, S = {self.scale:g} from the first token on"


def _context(model: Model, wish: Wish, table: _Table, shares: int) -> int:
    """-c: all slots' together. shares: slots among which it is divided, 1 where each may take all of it."""
    n_ctx = wish.n_ctx or table.n_ctx
    share = -(-n_ctx // max(shares, 1))
    if share > table.n_ctx:
        extend = f"`mrrope extend` with --ctx {share}"
        raise Refused(
            f"{model.name}: {share} tokens of context{' for each slot' if shares > 1 else ''}, and "
            f"{'the table' if table.flagged else 'the file'} has {table.n_ctx}",
            why="past its context a model soon writes nonsense",
            fix=extend if model.stored else f"{extend}, or --scale {share / model.facts.n_ctx_train:.4g} as it is",
        )
    return n_ctx


def _require_slots(setting: Setting) -> None:
    if setting.n_ctx // setting.n_seq_max < 1:
        why = f"{setting.n_ctx} tokens are shared out among {setting.n_seq_max} slots"
        raise Refused("there is no context left for a slot", why=why, fix="fewer slots (-np) or a larger -c")


def _elsewhere(wish: Wish, program: Program) -> bool:
    """Whether part of the model may lie in a memory that this machine's does not tell of."""
    return bool(wish.rpc) or (program.on_gpu and wish.n_gpu_layers != "0")


def _memory(wish: Wish, setting: Setting, machine: MachineMemory | None, *, elsewhere: bool) -> tuple[str, int | None]:
    """What to say of memory, and how many MiB conversations that are put away may take (None: the server's own)."""
    model = read_model(wish.path)
    caches, compute, total = model.needs(setting)
    kv = sum(cache.nbytes for cache in caches)
    kinds = setting.type_k if setting.type_k == setting.type_v else f"{setting.type_k}/{setting.type_v}"
    parts = f"weights {size(model.weights)} + KV cache {kinds} {size(kv)} + compute {size(compute)} = {size(total)}"
    if machine is None:
        return parts, wish.cache_ram
    if elsewhere:
        return f"{parts}, some of it on other devices; {size(machine.available)} are free here", wish.cache_ram
    have = f"{size(machine.available)} of {size(machine.total)} are free"
    if total + RESERVE > machine.available and not wish.force:
        raise DoesNotFit(
            f"{printable(wish.path.name)}: {setting.n_ctx} tokens of context do not fit in memory",
            why=f"{parts}, {size(RESERVE)} for the server itself, and {have}",
            fix=_what_fits(model, setting, machine.available - RESERVE),
        )
    # what llama-server keeps of conversations that wait comes on top: half of what is left
    spare = max(machine.available - total - RESERVE, 0) // 2 >> 20
    ram = min(CACHE_RAM, spare) if wish.cache_ram is None else wish.cache_ram
    kept = f"up to {size(ram << 20)}" if ram >= 0 else "no limit"
    return f"{parts}; {have}; {kept} for conversations that wait", ram


def _what_fits(model: FitModel, setting: Setting, available: int) -> str:
    """Flags that help, the mildest first: a q8_0 cache, a smaller context, both."""
    quantised = replace(setting, type_k="q8_0", type_v="q8_0", flash_attn=True)
    flash = "" if setting.flash_attn else " -fa on"  # a quantised V needs it
    ways = []
    for wanted, flags in ((setting, ""), (quantised, f"-ctk q8_0 -ctv q8_0{flash}")):
        try:
            largest = model.largest(wanted, available)
        except Refused:  # a cache of this type is nothing for this model
            continue
        if largest and largest < setting.n_ctx:
            ways.append(f"-c {largest} {flags}".strip())
        elif largest != 0 and flags:
            ways.insert(0, flags)
    if setting.type_k == setting.type_v == "q8_0":
        del ways[1:]
    help_ = ", or ".join(ways) or "close other programs, or take a smaller model or quantisation"
    return f"{help_}; --force starts it all the same"


def _context_flags(setting: Setting, wish: Wish) -> list[str]:
    return [
        "-c", str(setting.n_ctx), "-ctk", setting.type_k, "-ctv", setting.type_v, "-fa", wish.flash_attn,
        "-np", str(setting.n_seq_max), "-kvu" if setting.kv_unified else "-no-kvu",
        "-b", str(setting.n_batch), "-ub", str(setting.n_ubatch),
    ]  # fmt: skip


def _place_flags(wish: Wish) -> list[str]:
    given = {"-ngl": wish.n_gpu_layers, "-t": wish.threads, "-tb": wish.threads_batch}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    return [*flags, *(["--rpc", ",".join(wish.rpc)] if wish.rpc else [])]


def _alias(model: Model, wish: Wish, env: Mapping[str, str]) -> list[str]:
    """The name that the API gives the model: llama-server's own would drop what looks like a quantisation or a size."""
    if "LLAMA_ARG_ALIAS" in env or any(word in ("-a", "--alias") for word in wish.extra):
        return []
    return ["--alias", model.path.stem.replace(",", "_")]


def _network_flags(wish: Wish, program: Program, env: Mapping[str, str]) -> list[str]:
    flags = ["--host", wish.host, "--port", str(wish.port), "--jinja"]
    if not wish.page:
        flags.append("--no-ui")
    elif program.page:
        flags += ["--path", str(program.page)]
    # else any web page that is open in a browser of this machine could talk to the model
    if is_loopback(wish.host) and "--cors-origins" not in wish.extra and "LLAMA_ARG_CORS_ORIGINS" not in env:
        flags += ["--cors-origins", "localhost"]
    if "LLAMA_ARG_LOG_VERBOSITY" not in env and not any(word in _VERBOSITY for word in wish.extra):
        flags += ["-lv", "4" if wish.verbose else "2"]
    return flags


def _notes(model: Model, wish: Wish, program: Program) -> list[str]:
    notes = [f"note    {program.note}"] if program.note else []
    if model.template is None and "--chat-template" not in wish.extra and "--chat-template-file" not in wish.extra:
        notes.append("note    the file has no chat template: ChatML is assumed (-- --chat-template NAME)")
    if wish.page and program.page is None and program.engine is not None:
        notes.append("note    no web page: `mrrope build` adds it where npm is installed")
    return notes


def _exposure(wish: Wish, scheme: str, env: Mapping[str, str]) -> list[str]:
    """Who can reach the server."""
    keyed = bool(env.get("LLAMA_API_KEY") or env.get("LLAMA_ARG_API_KEY_FILE") or "--api-key-file" in wish.extra)
    if is_loopback(wish.host):
        return [f"address {wish.host}:{wish.port}, this machine only{', with an API key' * keyed}"]
    everywhere = wish.host in ("0.0.0.0", "::")  # what the user asked for is said  # nosec B104
    reach = "every network this machine is in" if everywhere else f"all who reach {wish.host}"
    plain = "" if scheme == "https" else "; what is said goes unencrypted"
    who = "who has the API key may use it" if keyed else "no API key is set, so anyone there may use it (LLAMA_API_KEY)"
    return [f"warning: port {wish.port} is open to {printable(reach)}: {who}{plain}"]


def _check_extra(extra: tuple[str, ...]) -> None:
    """Refused for arguments after `--` that serve has of its own, and for a key that every user here would see."""
    for word in extra:
        if word == "--api-key":
            raise Refused(
                "--api-key: not as an argument",
                why="every user of this machine sees the arguments of a running program",
                fix="LLAMA_API_KEY=... mrrope serve MODEL, or -- --api-key-file FILE",
            )
        if ours := next((name for name, words in _OURS.items() if word in words), None):
            raise Refused(f"{word} after --", why="serve decides it, and says it before it starts", fix=f"use {ours}")


def _after(flag: str, words: tuple[str, ...]) -> str:
    """The value of a flag, "" where it is not given."""
    return words[words.index(flag) + 1] if flag in words[:-1] else ""


# LLAMA_ARG_ variables of flags that are on the command line now, theirs or others: llama-server would warn of each
_SAID = (
    "MODEL", "CTX_SIZE", "CACHE_TYPE_K", "CACHE_TYPE_V", "FLASH_ATTN", "N_PARALLEL", "KV_UNIFIED", "BATCH", "UBATCH",
    "HOST", "PORT", "JINJA", "N_GPU_LAYERS", "THREADS", "RPC", "CACHE_RAM", "STATIC_PATH", "ROPE_ELASTIC",
)  # fmt: skip


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    said = {f"LLAMA_ARG_{name}" for name in _SAID}
    return {name: value for name, value in env.items() if name not in said}
