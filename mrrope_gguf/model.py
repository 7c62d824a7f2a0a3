"""Running an extended model: `load` gives a plain `llama_cpp.Llama` on which the file's own RoPE settings hold.

`Llama(...)` on its own opens 512 tokens of context, and its YaRN defaults (betas 32 and 1, attention factor 1) take the
place of what a file says about them, which mistral3 and grok files do. (`rope.scaling.attn_factor`, where an extended
file keeps its temperature, holds either way.) `load` inherits everything, and refuses what would go wrong.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrrope_gguf import engine
from mrrope_gguf.errors import DoesNotFit, EngineTrouble, Refused
from mrrope_gguf.facts import SCALING_TYPES
from mrrope_gguf.fit import Model, read_model, size
from mrrope_gguf.gguf.index import GGUFIndex, open_gguf
from mrrope_gguf.gguf.source import require_no_journal
from mrrope_gguf.gguf.types import GGML_TYPES, ggml_type
from mrrope_gguf.header import Header
from mrrope_gguf.kinds import known_architecture
from mrrope_gguf.kvcache import Setting
from mrrope_gguf.layers import window
from mrrope_gguf.machine import machine_memory
from mrrope_gguf.progress import Progress
from mrrope_gguf.reexpress import moves_rows
from mrrope_gguf.stored_table import carrier
from mrrope_gguf.text import printable
from mrrope_gguf.watch import OnStage, guard_window, report_eval, report_stages

if TYPE_CHECKING:
    from llama_cpp import Llama

# values that make llama.cpp ask the file; Llama's own defaults override it
INHERIT = {
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "rope_scaling_type": -1,
}

# enum llama_rope_scaling_type by the names of --rope-scaling; the patch adds the last two
ROPE_SCALING = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3, "mrrope-uni": 4, "mrrope-pro": 5}


@dataclass(frozen=True)
class _File:
    """What `load` must know about a file before llama.cpp sees it."""

    path: Path
    arch: str
    n_ctx: int
    scaling_type: str
    method: str | None
    portable: bool
    reexpressed_from: str | None
    elastic: bool
    window: int
    templates: tuple[str, ...]

    @property
    def name(self) -> str:
        return printable(self.path.name)


def load(
    path: str | os.PathLike[str],
    n_ctx: int | None = None,
    *,
    elastic: bool | None = None,
    on_stage: OnStage | None = None,
    progress: Progress | None = None,
    allow_stock: bool = False,
    past_window: bool = False,
    check_memory: bool = True,
    **llama_kwargs: Any,
) -> Llama:
    """Open a model with its whole context (or n_ctx tokens of it) and the RoPE settings its file holds.

    Runs on the patched engine where `mrrope build` made one, else on stock. Takes everything `llama_cpp.Llama` takes.
    Other defaults than Llama's: the file's context instead of 512 tokens, RoPE settings inherited from the file, quiet
    (llama.cpp's log shows in the error if loading fails; verbose=True prints it), flash attention on, and a
    sliding-window cache no larger than its window (swa_full=False). type_k and type_v may be names, such as "q8_0", and
    so may rope_scaling_type: with "mrrope-pro" or "mrrope-uni" the patched engine runs a file that was not extended at
    any n_ctx (S = n_ctx / the file's, or 1/rope_freq_scale).

    elastic: None does what the file says: of an extended file the patched engine runs the original model up to its own
    context and lets the table grow with the conversation from there (a stock library cannot: the file's table is
    static there, and a warning says so). True insists on it, also for rope_scaling_type="mrrope-pro"; False holds the
    file's table from the first token on. engine.get_elastic(llm) tells the S in effect.
    on_stage(change): called after a decode that moved the table, with a watch.StageChange.
    progress(done, total): called after every n_batch tokens of a prompt that any of Llama's methods evaluates.
    allow_stock: run a file for the patched engine on a stock library, where it is YaRN of the same scale.
    past_window: allow an n_ctx beyond the file's context, to see what an unextended model does there.
    check_memory: stop a model that does not fit before it loads; not done with n_gpu_layers.

    Raises EngineTrouble (no libllama, a stock one for a file or an option that needs the patch, a failure inside),
    DoesNotFit, Refused (n_ctx past the file's context, a LoRA for a re-expressed file, elastic=True without a table or
    with keys that cannot be rotated, a chat template that is broken), BadFile, FileTrouble.

    >>> llm = load("model-ContextLength32k.gguf")  # doctest: +SKIP
    >>> llm.n_ctx()  # doctest: +SKIP
    32768
    """
    file = _read(Path(path))
    _check_lora(file, llama_kwargs)
    scaling = _scaling(llama_kwargs)
    n_ctx = _context(file, n_ctx, past_window or scaling > 0)
    options = _options(n_ctx, {**llama_kwargs, "rope_scaling_type": scaling})
    if check_memory and not options.get("vocab_only") and not options.get("n_gpu_layers"):
        _check_memory(read_model(path), _setting(options), bool(options.get("logits_all")))
    _check_engine(file, scaling, allow_stock, elastic)
    llm = _construct(file, options)
    if file.window and not options["swa_full"]:
        guard_window(llm, file.window)
    if elastic is not None and engine.has_elastic():
        engine.set_elastic(llm, elastic)
    if on_stage and engine.has_elastic():
        report_stages(llm, on_stage)
    if progress:
        report_eval(llm, progress)
    return llm


def prefill(llm: Llama, tokens: Sequence[int], progress: Progress | None = None) -> None:
    """Feed tokens to the model after what it holds already, n_batch at a time, with progress(done, total) after each.

    Ctrl-C stops between batches and leaves the model with the batches that were finished: llm.n_tokens says how many.
    Raises Refused if they do not all fit in the context (nothing is fed then), EngineTrouble if llama.cpp fails.
    """
    total, room = len(tokens), llm.n_ctx() - llm.n_tokens
    if total > room:
        raise Refused(
            f"{total} tokens do not fit in the context",
            why=f"it holds {llm.n_ctx()} tokens, {llm.n_tokens} are taken and {room} are free",
            fix="load the model with a larger n_ctx, or extend the file with `mrrope extend`",
        )
    feed = type(llm).eval
    for start in range(0, total, llm.n_batch):
        batch = tokens[start : start + llm.n_batch]
        with engine.capture() as log:
            try:
                feed(llm, batch)
            except RuntimeError as err:
                raise EngineTrouble(
                    f"llama.cpp stopped at token {llm.n_tokens}", why=f"{err}: {log.why()}", fix="try a smaller n_ctx"
                ) from err
        if progress:
            progress(start + len(batch), total)


def _read(path: Path) -> _File:
    require_no_journal(Path(path))
    with open_gguf(path) as index:
        arch = known_architecture(index)
        header = Header(index, arch.name)
        return _File(
            path=path,
            arch=arch.name,
            n_ctx=header.u32("context_length", 0),
            scaling_type=header.text("rope.scaling.type", "none"),
            method=_optional(index, "mrrope.method"),
            portable=carrier(index, arch) != "engine",
            reexpressed_from=_optional(index, "mrrope.reexpressed_from"),
            elastic=bool(index.get(f"{index.arch}.rope.scaling.mrrope.elastic", False)),
            window=window(header),
            templates=_templates(index),
        )


def _templates(index: GGUFIndex) -> tuple[str, ...]:
    """All chat templates, which llama-cpp-python compiles as soon as it opens a model."""
    values = (index.get(key) for key in index.kvs if f"{key}.".startswith("tokenizer.chat_template."))
    return tuple(value for value in values if isinstance(value, str))


def _optional(index: GGUFIndex, name: str) -> str | None:
    value = index.get(f"{index.arch}.rope.scaling.{name}")
    return None if value is None else str(value)


def _context(file: _File, n_ctx: int | None, past_window: bool) -> int:
    if file.scaling_type not in SCALING_TYPES:
        raise Refused(
            f"{file.name}: rope.scaling.type is '{printable(file.scaling_type)}'",
            why=f"llama.cpp knows {', '.join(SCALING_TYPES)}, and ends the whole process at any other",
            fix="convert the model again, or extend the original with `mrrope extend`",
        )
    if n_ctx and n_ctx > file.n_ctx and not past_window:
        raise Refused(
            f"{file.name}: {n_ctx} tokens of context, and the file has {file.n_ctx}",
            why="past its context a model that was not extended soon writes nonsense",
            fix=f"`mrrope extend {file.name} --ctx {n_ctx}`, or load(..., past_window=True) to see it happen",
        )
    return n_ctx or file.n_ctx


def _check_lora(file: _File, llama_kwargs: dict[str, Any]) -> None:
    if file.reexpressed_from and llama_kwargs.get("lora_path"):
        origin = f"it was re-expressed from '{printable(file.reexpressed_from)}' as '{file.arch}'"
        raise Refused(
            f"{file.name}: a LoRA cannot be used with this file",
            why=f"{origin}: rows of attn_q and attn_k lie in another order than in the model the LoRA was made for"
            if moves_rows(file.reexpressed_from, file.arch)
            else f"{origin}, and llama.cpp refuses a LoRA made for a model of another architecture",
            fix="merge the LoRA into the original first, then `mrrope extend --portable`",
        )


def _scaling(given: dict[str, Any]) -> int:
    """rope_scaling_type as llama.cpp's number: -1 is the file's own. Names are those of its --rope-scaling."""
    value = given.get("rope_scaling_type")
    if isinstance(value, str):
        if value not in ROPE_SCALING:
            raise Refused(
                f"rope_scaling_type={value!r}", why=f"llama.cpp knows {', '.join(ROPE_SCALING)}", fix="take one of them"
            )
        return ROPE_SCALING[value]
    return -1 if value is None else int(value)


def _check_engine(file: _File, scaling: int, allow_stock: bool, elastic: bool | None) -> None:
    """EngineTrouble where what holds the table, the file's metadata or the caller's word, is nothing to stock."""
    named = {number: name for name, number in ROPE_SCALING.items() if name.startswith("mrrope")}.get(scaling)
    table = file.method not in (None, "none") and scaling != ROPE_SCALING["none"]
    own = table and not file.portable
    if not named and not elastic and (not own or allow_stock):
        engine.llama_cpp()
        if table and file.portable and file.elastic and elastic is None and not engine.has_elastic():
            because, fix = engine.why_stock()
            warnings.warn(
                f"{file.name}: its {file.method} table is static here, in effect from the first token on: {because}; "
                f"for elastic context {fix}, or load(..., elastic=False) to do without it",
                stacklevel=3,
            )
        return
    engine.llama_cpp(needs_patch=True)
    library = engine.loaded_library()
    if library.has_rope_table and (engine.has_elastic() or not elastic):
        return
    because, fix = engine.why_stock()
    stock = f"the stock libllama in {library.path.parent}"
    if named:
        what = f"rope_scaling_type={named!r} needs the patched engine"
        raise EngineTrouble(f"{file.name}: {what}", why=f"{stock} does not know it; {because}", fix=fix)
    if elastic:
        what = "elastic=True needs the patched engine"
        raise EngineTrouble(f"{file.name}: {what}", why=f"{stock} has static tables only; {because}", fix=fix)
    raise EngineTrouble(
        f"{file.name}: this file needs the patched engine",
        why=f"its {file.method} table is metadata that {stock} does not read; {because}",
        fix=f"{fix}; or `mrrope extend --portable` on the original; or load(..., allow_stock=True) for plain YaRN",
    )


def _options(n_ctx: int, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Llama: what was given, over our defaults."""
    options: dict[str, Any] = {
        "verbose": False,
        "flash_attn": True,
        "swa_full": False,
        **INHERIT,
        **given,
        "n_ctx": n_ctx,
    }
    for name in ("type_k", "type_v"):
        if isinstance(options.get(name), str):
            options[name] = ggml_type(options[name]).id
    return options


def _setting(options: dict[str, Any]) -> Setting:
    types = [GGML_TYPES[1 if options.get(name) is None else options[name]].name for name in ("type_k", "type_v")]
    return Setting(
        n_ctx=options["n_ctx"],
        type_k=types[0],
        type_v=types[1],
        n_batch=options.get("n_batch", 512),
        n_ubatch=options.get("n_ubatch", 512),
        flash_attn=bool(options["flash_attn"]),
        swa_full=bool(options["swa_full"]),
    )


def _check_memory(model: Model, setting: Setting, logits_all: bool) -> None:
    caches, compute, total = model.needs(setting)
    if logits_all:
        logits = setting.n_ctx * model.dims.n_vocab * 4
        compute, total = compute + logits, total + logits
    machine = machine_memory()
    if machine is None or total <= machine.available:
        return
    name, kv = printable(model.path.name), sum(cache.nbytes for cache in caches)
    largest = model.largest(setting, machine.available)
    raise DoesNotFit(
        f"{name}: {setting.n_ctx} tokens of context do not fit in memory",
        why=f"weights {size(model.weights)} + KV cache {size(kv)} + compute {size(compute)} = {size(total)}, "
        f"and {size(machine.available)} of {size(machine.total)} are free",
        fix=f"n_ctx={largest} fits with this cache; `mrrope fit {name}` shows what q8_0 would gain"
        if largest
        else "close other programs, or take a smaller model or quantisation",
    )


def _construct(file: _File, options: dict[str, Any]) -> Llama:
    from mrrope_gguf import chat_jinja

    module = engine.llama_cpp()
    chat_jinja.bind(module)
    chat_jinja.check_all(file.templates, file.name)
    with nullcontext() if options["verbose"] else engine.capture() as log:
        try:
            llm: Llama = module.Llama(model_path=str(file.path), **options)
        except (ValueError, RuntimeError, AssertionError) as err:
            raise EngineTrouble(
                f"{file.name}: llama.cpp could not open it",
                why=log.why() if log else str(err),
                fix="`mrrope inspect` checks the file, verbose=True shows llama.cpp's whole log",
            ) from err
    return llm
