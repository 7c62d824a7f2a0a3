"""From what a user asks for to the passes of a suite: every way gets the same texts, lengths and questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .. import engine
from ..errors import MrropeError, Refused
from ..facts import read_facts
from ..fetch import Say
from ..gguf.source import Source
from . import retrieval, ruler_tasks
from .identity import model_identity
from .longfiles import INFINITEBENCH
from .passes import LossPass, Pass, TaskPass, loss_passes
from .run_losses import text_tokens
from .scoring import require_rouge
from .spec import BLOCK, Spec, Text, find_files, find_texts, text_name
from .tasks import DEPTHS, cost, documents, sample_names
from .ways import Way, parse, reach

KINDS = ("ppl", "kl", "needle", "ruler", "retrieval", "all")
TEXTS = ("voyage-out",)
SEED = 42
SAMPLES = {"needle": 1, "ruler": 5, "retrieval": 5}
FEW = 2  # samples of RULER and retrieval in `all`: each costs a whole length of reading for every way
GROUPS = {"core": ruler_tasks.CORE, "offline": ruler_tasks.OFFLINE}
QUESTIONS = 20  # on one JSON object of key-value retrieval: it is read once for all of them


@dataclass(frozen=True)
class Request:
    """What a user asks to be measured. Empty and None take the defaults; lengths are in tokens.

    tasks: RULER's or InfiniteBench's retrieval tasks, by name. keys: named keys in one haystack, all asked for (fast,
    and another task than one needle). hay: `noise`, a name of `mrrope texts`, or a file. files: InfiniteBench's and
    LongBench v2's.
    """

    what: str
    methods: Sequence[str] = ()
    scale: float | None = 4.0
    lengths: Sequence[int] = ()
    texts: Sequence[str] = ()
    samples: int | None = None
    seed: int = SEED
    depths: Sequence[float] = DEPTHS
    hay: str = "noise"
    keys: int = 1
    tasks: Sequence[str] = ()
    files: Sequence[str] = ()
    squad: str | None = None
    hotpotqa: str | None = None
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def make_spec(model: str | os.PathLike[str], request: Request, say: Say | None = None) -> tuple[Spec, list[int], int]:
    """The suite's spec, the lengths it is measured at, and the model's own context, which scales count from.

    Raises Refused for lengths that make no sense, and what reading the model and its texts raises.
    """
    path = os.path.abspath(model)
    with Source.open(path) as source:
        window = reach(read_facts(source.index), force=request.force)
    _check_scale(request.scale, window)
    lengths = sorted(set(request.lengths)) or default_lengths(window, request.scale or 1.0)
    # tasks say themselves what is too short for them
    if lengths[0] < (BLOCK if request.what in ("ppl", "kl", "all") else 1):
        why = f"losses are kept in blocks of {BLOCK}" if lengths[0] > 0 else "a text has one or more"
        raise Refused(f"a length of {lengths[0]} tokens", why=why, fix="ask for more tokens")
    prose = [] if request.hay == "noise" else [request.hay]
    wanted = list(dict.fromkeys([*(request.texts or _texts_of(request)), *prose]))
    n_ctx = min(lengths[-1], window) if request.what == "kl" else lengths[-1]
    spec = Spec(
        model=path, sha256=str(model_identity(path, force=request.force)["sha256"]), n_ctx=n_ctx,
        scale=request.scale, options=dict(request.options), texts=find_texts(wanted, say), files=_files(request),
        force=request.force,
    )  # fmt: skip
    return spec, lengths, window


def _check_scale(scale: float | None, window: int) -> None:
    if scale is not None and not (scale >= 1 and window * scale < 2**31):  # false for nan too
        raise Refused(
            f"a scale of {scale:g}",
            why=f"it is the new context / the model's {window} tokens: 1 or more, and llama.cpp counts to {2**31 - 1}",
            fix="--scale 4",
        )


def default_lengths(window: int, scale: float) -> list[int]:
    """Half the window, the window, and its doublings up to S times it.

    >>> default_lengths(8192, 4)
    [4096, 8192, 16384, 32768]
    """
    found, length = [max(window // 2, BLOCK)], window
    while length <= window * scale + 0.5:
        found.append(length)
        length *= 2
    return sorted({n for n in (*found, int(window * scale)) if n >= BLOCK})


def make_passes(
    llm: Any, spec: Spec, request: Request, lengths: Sequence[int], window: int, say: Say | None = None
) -> list[Pass]:
    """Every pass, task by task and way by way, so that a suite that is cut short has whole comparisons.

    llm: tokenises; its vocabulary is enough. Lengths too short for a task are left out of `all`, and `say` is told.
    Raises MrropeError for names that are none, lengths too short for a task, and texts too short for a length.
    """
    ways = parse(_methods(request), spec.scale)
    found: list[Pass] = []
    for what in ("ppl", "kl", "needle", "retrieval", "ruler") if request.what == "all" else (request.what,):
        if what in ("ppl", "kl"):
            found += _loss_passes("ppl" if what == "ppl" else "kl", spec, request, ways, lengths, window)
        else:
            for task in _tasks(spec, request, what, window):
                fit = _fitting(llm, spec, task, lengths, say) if request.what == "all" else lengths
                found += _task_passes(llm, spec, task, ways, fit) if fit else []
    ends: dict[str, int] = {}
    for each in found:
        if isinstance(each, LossPass):
            ends[each.text] = max(each.end, ends.get(each.text, 0))
    for name, end in ends.items():
        text_tokens(llm, spec, name, end)
    if not found:
        raise MrropeError("nothing to measure", why="every way and length was left out", fix="see `mrrope eval --help`")
    return found


def _texts_of(request: Request) -> Sequence[str]:
    """The texts that are read where none was named: losses need one, and RULER's essays do."""
    essays = request.what == "ruler" and any(
        ruler_tasks.find(task).needs == "essay" for task in request.tasks if task not in GROUPS
    )
    return TEXTS if request.what in ("ppl", "kl", "all") or essays or "offline" in request.tasks else ()


def _files(request: Request) -> tuple[Text, ...]:
    named = {"squad": request.squad, "hotpotqa": request.hotpotqa}
    own = tuple(replace(find_files([path])[0], name=name) for name, path in named.items() if path)
    return (*find_files(request.files), *own)


def _methods(request: Request) -> list[str]:
    """The ways that were asked for. Perplexity is never without truncation, which is what everyone has already."""
    named = list(request.methods) or ["none", "truncate", "yarn", "mrrope-uni", "mrrope-pro"]
    if not request.methods and engine.has_elastic():
        named.append("elastic")
    if request.what in ("ppl", "all") and "truncate" not in named:
        named.append("truncate")
    if "none" in named and "truncate" in named:
        named.remove("truncate")
        named.insert(named.index("none") + 1, "truncate")  # it shares cells with the original, which comes first
    return named


def _loss_passes(
    task: Literal["ppl", "kl"], spec: Spec, request: Request, ways: Iterable[Way], lengths: Sequence[int], window: int
) -> list[Pass]:
    measured = [way for way in ways if task == "ppl" or way.kind not in ("none", "truncate")]
    names = [text_name(text) for text in dict.fromkeys(request.texts or TEXTS)]
    return [
        each
        for text in names
        for way in measured
        for each in loss_passes(task, text, way.name, lengths, window, by_length=way.by_length)
    ]


def _tasks(spec: Spec, request: Request, what: str, window: int) -> list[TaskPass]:
    """The tasks of a kind, each as a pass without way and lengths."""
    n = request.samples or (min(SAMPLES[what], FEW) if request.what == "all" else SAMPLES[what])
    base = TaskPass("", "", (), (), request.seed, n, window)
    if what == "needle":
        hay = "noise" if request.hay == "noise" else text_name(request.hay)
        if request.keys > 1:
            return [_named(replace(base, task=f"needle-keys/{hay}", keys_per_text=request.keys))]
        return [_named(replace(base, task=f"needle/{hay}", depths=tuple(request.depths)))]
    found: list[TaskPass] = []
    if what == "ruler":
        for name in _ruler_tasks(request):
            needs = ruler_tasks.find(name).needs
            hidden_in = spec.texts[0].name if needs == "essay" and spec.texts else ""
            tag = f"-{request.seed}-{hidden_in}".removesuffix("-")
            asked = documents(spec, name) if needs == "documents" else None
            fewer = min(n, len(asked.questions)) if asked else n
            found.append(_named(replace(base, task=f"ruler/{name}", n=fewer, tag=tag)))
        return found
    own = bool(request.files) and request.what != "all"  # then only these were asked for
    for name in _chosen(request, what) or (() if request.tasks or own else tuple(retrieval.TASKS)):
        if name not in retrieval.TASKS:
            why = "they are " + ", ".join(retrieval.TASKS)
            raise MrropeError(f"{name}: no such retrieval task", why=why, fix="name one of them")
        questions = QUESTIONS if name == "kv" else 1
        tag = f"-{request.seed}-of-{n}"
        found.append(_named(replace(base, task=f"retrieval/{name}", keys_per_text=questions, tag=tag)))
    for text in spec.files:
        if text.name not in ("squad", "hotpotqa"):
            family = "infinitebench" if text.name in INFINITEBENCH else "longbench"
            if family == "infinitebench" and INFINITEBENCH[text.name].metric == "rouge":
                require_rouge()
            lines = min(n if request.what == "all" else request.samples or sys.maxsize, _lines(text))
            found.append(_named(replace(base, task=f"{family}/{text.name}", n=lines)))
    return found


def _chosen(request: Request, what: str) -> list[str]:
    """The tasks that were named; in a suite of all, those of one kind. Raises MrropeError for a name of no kind."""
    if request.what != "all":
        return list(request.tasks)
    known = {"ruler": (*GROUPS, *ruler_tasks.TASKS), "retrieval": tuple(retrieval.TASKS)}
    for name in request.tasks:
        if not any(name in names for names in known.values()):
            why = "they are " + ", ".join(name for names in known.values() for name in names)
            raise MrropeError(f"{name}: no such task", why=why, fix="name one of them")
    return [name for name in request.tasks if name in known[what]]


def _named(task: TaskPass) -> TaskPass:
    return replace(task, samples=sample_names(task))


def _lines(text: Text) -> int:
    """The examples of a benchmark file: lines of JSON, or members of its one list."""
    import json

    words = text.read()
    if words.lstrip()[:1] == "[":
        try:
            return len(json.loads(words))
        except ValueError as error:
            raise MrropeError(f"{text.path}: not JSON", why=str(error), fix="download the file again") from None
    return sum(bool(line.strip()) for line in words.split("\n"))


def _ruler_tasks(request: Request) -> list[str]:
    named = _chosen(request, "ruler") or ([] if request.tasks else ["core"])
    found = [name for each in named for name in GROUPS.get(each, (each,))]
    found += ["qa_1"] * bool(request.squad) + ["qa_2"] * bool(request.hotpotqa)
    for name in found:
        ruler_tasks.find(name)
    return list(dict.fromkeys(found))


def _fitting(llm: Any, spec: Spec, task: TaskPass, lengths: Sequence[int], say: Say | None) -> list[int]:
    """The lengths that are long enough for a task; `say` is told of the others."""
    fit: list[int] = []
    for length in lengths:
        try:
            cost(llm, spec, replace(task, lengths=(length,)))
        except MrropeError as error:
            if say:
                say(f"note: {task.task} is left out at {length} tokens: {error.what} ({error.why})")
        else:
            fit.append(length)
    return fit


def _task_passes(llm: Any, spec: Spec, task: TaskPass, ways: Iterable[Way], lengths: Sequence[int]) -> list[Pass]:
    """One pass for each way, or for each length of a way of mode B."""
    whole = replace(task, lengths=tuple(lengths))
    costs = cost(llm, spec, whole)
    short = cost(llm, spec, replace(whole, way="truncate")) if any(way.kind == "truncate" for way in ways) else ()
    found: list[Pass] = []
    for way in ways:
        if not way.by_length:
            found.append(replace(whole, way=way.name, cost=short if way.kind == "truncate" else costs))
            continue
        for length in lengths:
            alone = replace(task, way=way.name, lengths=(length,))
            found.append(replace(alone, cost=cost(llm, spec, alone)))
    return found
