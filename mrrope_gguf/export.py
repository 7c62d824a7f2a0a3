"""`mrrope export`: hand a model over to Ollama, LM Studio or llama-server, with the context it was made for.

Ollama and LM Studio bring llama.cpp of their own: only a portable file runs extended there, under a static table. One
for the patched engine is refused, with what makes it portable. This project has run neither, and every export says so.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import EngineTrouble, MrropeError, Refused
from .facts import RopeFacts, read_facts, rope_facts
from .gguf.index import GGUFIndex, open_gguf, open_split
from .gguf.source import Source, require_no_journal
from .progress import Progress
from .stored_table import StoredTable, stored_table
from .tables import METHODS
from .text import printable

if TYPE_CHECKING:
    from .engine.programs import Program

Target = Literal["ollama", "lmstudio", "llama-server"]
TARGETS: tuple[Target, ...] = ("ollama", "lmstudio", "llama-server")
PUBLISHER = "mrrope"  # the folder of LM Studio's library that ours go to


@dataclass(frozen=True)
class Exported:
    """`text` is for stdout: what was written, or what to paste. `notes` say what to do next and what was not tried."""

    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What the targets must know of a file; `stored` is None for one that is not extended."""

    path: Path
    shards: list[Path]
    facts: RopeFacts
    stored: StoredTable | None
    n_ctx: int
    template: str | None
    tokens: dict[str, str]  # bos, eos, eot, eom: as text

    @property
    def name(self) -> str:
        return printable(self.path.name)

    @property
    def rendering(self) -> str:
        return self.stored.rendering if self.stored else ""

    @property
    def attn_factor(self) -> float:
        return self.stored.table.attn_factor if self.stored else 1.0


def export(
    target: Target,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """What `target` needs to run the model in `path` with n_ctx tokens (0: all that the file has).

    out: the folder for Ollama's Modelfile, or LM Studio's folder of models, into which the file is linked or copied;
    without it the Modelfile or the commands are given as text. force: replace what is there.
    Raises Refused where the target cannot run the file extended, EngineTrouble where no patched llama-server is built
    for a file that needs it, FileTrouble, BadFile.
    """
    model = read(path, n_ctx)
    if target == "llama-server":
        if out is not None:
            fix = "leave -o out"
            raise Refused("llama-server: there is nothing to write", why="it takes a command line alone", fix=fix)
        return _llama_server(model)
    _require_portable(model, {"ollama": "Ollama", "lmstudio": "LM Studio"}[target])
    if target == "ollama":
        from .modelfile import ollama

        return ollama(model, None if out is None else Path(out), force)
    return _lmstudio(model, None if out is None else Path(out), force, progress)


def read(path: str | os.PathLike[str], n_ctx: int = 0) -> Model:
    """The model that any file of it names. Raises Refused for more context than it has, FileTrouble, BadFile."""
    require_no_journal(Path(path))
    shards = [shard.absolute() for shard in open_split(path)]
    with open_gguf(shards[0]) as index:
        facts = read_facts(index)
        template = index.get("tokenizer.chat_template")
        model = Model(
            path=shards[0],
            shards=shards,
            facts=facts,
            stored=stored_table(index, facts),
            n_ctx=n_ctx or facts.n_ctx_train,
            template=template if isinstance(template, str) else None,
            tokens=_tokens(index),
        )
    if model.n_ctx > facts.n_ctx_train:
        raise Refused(
            f"{model.name}: {model.n_ctx} tokens of context, and the file has {facts.n_ctx_train}",
            why="past its context a model soon writes nonsense",
            fix=f"`mrrope extend {_quoted(model.path)} --ctx {model.n_ctx}`",
        )
    return model


def _tokens(index: GGUFIndex) -> dict[str, str]:
    pieces = index.get("tokenizer.ggml.tokens")
    found = {}
    for name in ("bos", "eos", "eot", "eom"):
        number = index.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(pieces, list) and isinstance(number, int) and 0 <= number < len(pieces):
            found[name] = str(pieces[number])
    return found


def _require_portable(model: Model, program: str) -> None:
    """Refused for a file that holds its table for the patched engine alone; the fix is the command that helps."""
    if model.rendering != "engine" or model.stored is None:
        return
    from .extend import choose_rendering

    why = f"its {printable(model.stored.table.method)} table is metadata that {program}'s own llama.cpp does not read"
    try:
        with Source.open(model.path) as source:
            choose_rendering(rope_facts(source.index), source, "portable")
    except Refused as refusal:
        raise Refused(
            f"{model.name}: {program} cannot run this file extended",
            why=f"{why}, and it cannot be made portable: {refusal.why}",
            fix="`mrrope export llama-server` gives the command for the patched engine, whose API others can use",
        ) from None
    method = model.stored.table.method
    table = f"--method {method}" if method in METHODS and method != "custom" else "--radix TABLE.json"
    command = f"mrrope extend {_quoted(model.path)} DST --ctx {model.facts.n_ctx_train} {table} --portable"
    raise Refused(
        f"{model.name}: {program} cannot run this file extended", why=why, fix=f"`{command}`, then export DST"
    )


def static_notes(model: Model) -> list[str]:
    """What an extended file loses in an engine that holds its table from the first token on."""
    if model.stored is None:
        return ["this file is not extended: the target gets its own context"]
    price = f"the table is static there: S = {model.stored.table.scale:g} from the first token on"
    notes = [f"{price}, which costs something within the first {model.facts.n_ctx_orig}"]
    if model.rendering == "long" and model.n_ctx <= model.facts.n_ctx_orig:
        notes.append(f"with {model.n_ctx} tokens, not above {model.facts.n_ctx_orig}, llama.cpp takes plain angles")
    return notes


def memory_note(model: Model) -> str:
    """The memory that this context takes, one line; "" where the header does not tell."""
    from .fit import read_model, size
    from .kvcache import Setting

    try:
        needed = read_model(model.path).needs(Setting(n_ctx=model.n_ctx))[2]
    except MrropeError:
        return ""
    return f"{model.n_ctx} tokens take {size(needed)} of memory in all, with an f16 cache; -c N asks for fewer"


def _lmstudio(model: Model, out: Path | None, force: bool, progress: Progress | None) -> Exported:
    stem = model.path.name.removesuffix(".gguf").removesuffix(f"-00001-of-{len(model.shards):05d}")
    folder = f"{PUBLISHER}/{stem}"
    load = f"lms load {shlex.quote(folder)} --context-length {model.n_ctx}"
    notes = [
        f"then load it with {model.n_ctx} tokens: Context Length in the model's settings, or `{printable(load, 400)}`",
        *static_notes(model),
        *filter(None, [memory_note(model)]),
        "LM Studio was not run by this project",
    ]
    if out is None:
        target = f"~/.lmstudio/models/{shlex.quote(folder)}"
        links = [f"ln {_quoted(shard.resolve())} {target}/{shlex.quote(shard.name)}" for shard in model.shards]
        text = printable_lines([f"mkdir -p {target}", *links])
        return Exported(text, ("where the disk is another one: cp in place of ln", *notes))
    from .hand_over import link_or_copy

    paths, how = link_or_copy(model.path, out / PUBLISHER / stem, force=force, progress=progress)
    if how == "hardlink":
        notes.insert(0, "it is the same file under a second name: `mrrope extend --in-place` will refuse to change it")
    return Exported("\n".join(map(str, paths)), tuple(notes))


def _llama_server(model: Model) -> Exported:
    engine_only = model.rendering == "engine"
    elastic = bool(model.stored and model.stored.elastic)
    program, trouble = _patched_server()
    if engine_only and program is None:
        command = _command(Path("llama-server"), model, elastic)
        raise EngineTrouble(
            f"{model.name}: this file needs the patched llama-server",
            why=f"its table is metadata that a stock one does not read, and {trouble}",
            fix=f"`mrrope build` once, then the same command again; where there is one: {command}",
        )
    if program is not None and (engine_only or elastic):
        notes = ["elastic: the original model up to its own window"] if elastic else []
        notes += filter(None, [program.note, memory_note(model)])
        return Exported(_command(program.path, model, elastic), tuple(notes))
    notes = static_notes(model)
    if elastic:
        notes.append(f"{trouble}: `mrrope build` makes a llama-server under which its context is elastic")
    stock = Path("llama-server")
    if program is not None and shutil.which("llama-server") is None:
        stock = program.path
    return Exported(_command(stock, model, False), (*notes, *filter(None, [memory_note(model)])))


def _command(program: Path, model: Model, elastic: bool) -> str:
    words = [str(program), "-m", str(model.path), "-c", str(model.n_ctx), *(["--rope-elastic", "on"] * elastic)]
    return shlex.join(words)


def _patched_server() -> tuple[Program | None, str]:
    """The llama-server that `mrrope serve` would run, or why there is none."""
    from .engine import binding_version
    from .engine.programs import server_program

    try:
        return server_program(binding_version()), ""
    except EngineTrouble as trouble:
        return None, trouble.why


def printable_lines(lines: list[str]) -> str:
    return "\n".join(printable(line, limit=4000) for line in lines)


def _quoted(path: Path) -> str:
    return printable(shlex.quote(str(path)), limit=1000)
