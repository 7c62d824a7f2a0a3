"""`mrrope chat` from the command line to the first word: model, documents, context, memory, load, session."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import documents, engine
from ..documents import Document
from ..errors import DoesNotFit, EngineTrouble, Refused
from ..fit import read_model, size
from ..machine import machine_memory
from ..model import load
from ..progress import Bar
from ..session import ChatSession
from ..text import printable
from ..vocab import Vocab
from . import memory, once, prompt, target
from .commands import COMMANDS, Commands
from .loop import converse
from .options import Options
from .plan import TURN, NeedsExtending, Plan, plan
from .speaker import Speaker, Stages
from .talk import Talk
from .target import Remembered, Target

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True)
class Ready:
    """All that is decided before a weight is read. `options` as they are after what the user chose."""

    target: Target
    options: Options
    plan: Plan
    documents: Sequence[Document]
    facts: list[str]


def chat(options: Options) -> int:
    """Run it; returns the exit code. Raises MrropeError for what cannot be done."""
    at_terminal = bool(sys.stdin) and sys.stdin.isatty()
    talks = options.prompt is None and at_terminal
    if talks and not sys.stdout.isatty():
        raise Refused(
            "there is nothing to ask",
            why="stdout is no terminal, so this is one answer, and stdin is one, so it holds no question",
            fix="-p 'QUESTION', or a pipe into stdin",
        )
    if talks:
        prompt.require()
    question = "" if talks else once.piped() if options.prompt is None else once.require(options.prompt)
    talk = Talk(can_ask=at_terminal and sys.stderr.isatty())
    ready = prepare(options, question, talk)
    stages = Stages(talk.say)
    llm = open_model(ready, talk, stages)
    speaker = Speaker(llm, talk, stages, full_scale(llm))
    try:
        speaker.session = open_session(speaker, ready, options.session)
        try:
            if not talks:
                return once.answer_once(speaker, question)
            _talk(speaker, ready)
            return 0
        finally:
            speaker.session.close()
    finally:
        llm.close()


def prepare(options: Options, question: str, talk: Talk) -> Ready:
    """Everything that can be known before a weight is read, each thing said; raises what stands in the way."""
    found = _documents(options, talk)
    before = target.remembered(options.session) if options.session else None
    there = target.read(target.find(options, before, talk.say))
    talk.say(str(there))
    engine.llama_cpp(needs_patch=there.method is not None, tell=talk.note)
    library = engine.loaded_library()
    talk.say(f"engine: {library.kind} llama.cpp {library.commit} on {', '.join(map(printable, library.devices))}")
    need = _count(there, options, question, found, before, talk)
    try:
        planned = plan(there, options, need, before, patched=library.has_rope_table)
    except NeedsExtending as needs:
        there = _extend(there, needs, talk)
        talk.say(str(there))
        options = replace(options, scale=None, method=None)
        planned = plan(there, options, need, None, patched=library.has_rope_table)
    options, planned, words = _fitted(there, options, planned, need, talk)
    return Ready(there, options, planned, found, [str(there), f"engine: {library}", *words])


def open_model(ready: Ready, talk: Talk, stages: Stages) -> Llama:
    """The model, loaded as it was planned; an unextended one with its table, elastic where its keys allow it."""
    options, planned = ready.options, ready.plan
    given: dict[str, Any] = {
        "n_batch": options.n_batch, "n_ubatch": options.n_ubatch, "flash_attn": options.flash_attn,
        "type_k": options.type_k, "type_v": options.type_v, "n_gpu_layers": options.gpu_layers,
        "verbose": options.verbose,
    }  # fmt: skip
    if options.threads is not None:
        given["n_threads"] = given["n_threads_batch"] = options.threads
    if options.threads_batch is not None:
        given["n_threads_batch"] = options.threads_batch
    if planned.scaling:
        given |= {"rope_scaling_type": planned.scaling, "rope_freq_scale": 1 / planned.scale}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            llm = load(ready.target.path, planned.n_ctx, on_stage=stages, **given)
        except MemoryError as error:
            what = f"{ready.target.name}: the system gave no memory for it"
            raise DoesNotFit(what, why=str(error), fix="a smaller -c, or close other programs") from None
    for warning in told:
        talk.note(str(warning.message))
    if planned.scaling and engine.has_elastic():
        try:
            engine.set_elastic(llm, True)
        except Refused as refusal:
            talk.note(f"the table is static, in effect from the first token on: {refusal.why}")
    return llm


def open_session(speaker: Speaker, ready: Ready, name: str | None, *, other: bool = False) -> ChatSession:
    """The conversation; with `other`, one that is kept under `name` already and brings its own documents."""
    return ChatSession(
        speaker.llm, None if other else ready.options.system,
        () if other else [(one.name, one.text) for one in ready.documents],
        name=name, on_progress=speaker.bar, on_note=speaker.talk.note, **ready.options.sampling,
    )  # fmt: skip


def full_scale(llm: Llama) -> float:
    """The S that the context may grow to; 1 for a model as it was."""
    if engine.has_elastic():
        return engine.get_elastic(llm).full_scale
    arch = llm.metadata.get("general.architecture")
    return float(llm.metadata.get(f"{arch}.rope.scaling.mrrope.scale", 1.0))


def _talk(speaker: Speaker, ready: Ready) -> None:
    commands = Commands(speaker, ready.facts, lambda name: open_session(speaker, ready, name, other=True))
    asks = prompt.Prompt([f"/{name}" for name in COMMANDS], speaker.talk.note)
    if turns := len(speaker.session.messages) // 2:
        speaker.talk.say(
            f"going on with {printable(speaker.session.name or '')}: {turns} turn{'s' * (turns > 1)} so far"
        )
    speaker.talk.say("/help lists the commands, Ctrl-D leaves")
    converse(speaker, commands, asks)


def _documents(options: Options, talk: Talk) -> list[Document]:
    with Bar("reading", ("pages", 1)) as bar:
        found = documents.read_all(options.files, progress=bar)
    for one in found:
        for note in one.notes:
            talk.note(f"{one.name}: {note}")
    return found


def _count(
    there: Target, options: Options, question: str, found: Sequence[Document], before: Remembered | None, talk: Talk
) -> int:
    """Tokens that the context must hold at least, and what each document takes of them."""
    with Vocab(there.path) as vocab:
        counts = documents.tokens_of(vocab, found)
        words = [text for text in (options.system, question) if text]
        asked = sum(vocab.count(text.encode("utf-8", "replace"), add_bos=False) for text in words)
    width = max((len(one.name) for one in found), default=0)
    for one, n in zip(found, counts, strict=True):
        pages = f", {one.pages} pages" if one.pages else ""
        talk.say(f"  {one.name:<{width}}  {n:>8} tokens  {one.kind}{pages}")
    # of a conversation that goes on, its documents are among its tokens
    return max(sum(counts), before.tokens if before else 0) + asked + TURN


def _extend(there: Target, needs: NeedsExtending, talk: Talk) -> Target:
    """The file extended, if the user wants it and this engine runs the result; else NeedsExtending is raised."""
    from ..extend import extend

    if not talk.can_ask:
        raise needs
    would = extend(there.path, n_ctx=needs.n_ctx, method=needs.method, dry_run=True)
    if would.rendering.kind == "engine":
        raise EngineTrouble(needs.what, why=f"{needs.why}; {would.rendering.why}", fix="`mrrope build` once")
    talk.say(f"{needs.what}\n  why: {needs.why}")
    if would.path.exists():
        if not talk.yes(f"{printable(would.path.name)} is there already. Take it?"):
            raise needs
        return target.read(would.path)
    where = "into the current folder" if would.elsewhere else "beside it"
    if not talk.yes(f"Extend it now? It writes {printable(would.path.name)} {where}, and leaves the original."):
        raise needs
    with Bar("copying", ("MB", 1e6)) as bar:
        done = extend(there.path, n_ctx=needs.n_ctx, method=needs.method, progress=bar)
    talk.say(f"wrote {printable(str(done.path))}")
    return target.read(Path(done.path))


def _fitted(there: Target, options: Options, planned: Plan, need: int, talk: Talk) -> tuple[Options, Plan, list[str]]:
    """Options and context that fit in memory, as they are or as the user chose. Raises DoesNotFit."""
    from ..engine.devices import gpus

    model = read_model(there.path)
    room = memory.Room(machine_memory(), gpus(), there.facts.n_layer)
    n_gpu = room.layers_on_gpu(options, model, planned.n_ctx)
    if not room.gpus and options.gpu_layers > 0:
        talk.note("-ngl: this engine has no GPU, all layers stay on the CPU")
    found = room.estimate(options, model, planned.n_ctx, n_gpu)
    if not room.fits(found):
        ways = memory.ways(room, options, model, planned.n_ctx, need)
        error = memory.does_not_fit(there.name, planned.n_ctx, found, room, ways)
        if not talk.can_ask or not ways:
            raise error
        talk.say(f"{error.what}\n  why: {error.why}\nWhat would fit:")
        chosen = talk.choose("Which?", [f"{way.flags:<28} {way.words}" for way in ways])
        if chosen is None:
            raise error
        options = replace(options, **ways[chosen].changes)
        planned = replace(planned, n_ctx=options.n_ctx or planned.n_ctx)
        n_gpu = room.layers_on_gpu(options, model, planned.n_ctx)
        found = room.estimate(options, model, planned.n_ctx, n_gpu)
    table = f", {planned.scaling} to S = {planned.scale:.3g}" if planned.scaling else ""
    free = f", {size(room.machine.available)} free" if room.machine else ""
    on_gpu = f", {min(n_gpu, room.n_layer)} of {room.n_layer} layers on the GPU" if n_gpu else ""
    words = [f"context: {planned.n_ctx} tokens{table}", f"memory: {found}{free}{on_gpu}"]
    for line in words:
        talk.say(line)
    return replace(options, gpu_layers=n_gpu), planned, words
