"""What each command does with its arguments: call the library, print the outcome. One function a verb."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .progress import Bar
from .said import put
from .said import say as _say
from .text import printable

if TYPE_CHECKING:
    from .engine.store import Engine
    from .extend import Extended
    from .gguf.write import WriteReport

_MB = ("MB", 1e6)


class _Report(Protocol):
    def to_json(self) -> dict[str, object]: ...
    def render(self) -> str: ...


def extend(args: argparse.Namespace) -> int:
    from .extend import extend as run
    from .tables import DEFAULT_METHOD

    with Bar("copying", _MB) as bar:
        done = run(
            args.model, args.dst, scale=args.scale, n_ctx=args.ctx, method=args.method or DEFAULT_METHOD,
            beta_fast=args.beta_fast, beta_slow=args.beta_slow, attn_factor=args.attn_factor, radix=args.radix,
            rendering=args.rendering, elastic=args.elastic, in_place=args.in_place, dry_run=args.dry_run,
            force=args.force, progress=bar,
        )  # fmt: skip
    for line in _told(done):
        _say(line)
    if done.written:
        put(done.path)
    return 0


def revert(args: argparse.Namespace) -> int:
    from .revert import revert as run

    with Bar("copying", _MB) as bar:
        done = run(args.model, args.dst, force=args.force, progress=bar)
    _say(f"the original, byte for byte: {_how(done)}")
    put(done.path)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from .inspect import inspect as run

    return _print(run(args.model, plot=args.plot), args.json)


def fit(args: argparse.Namespace) -> int:
    from .fit import fit as run

    return _print(run(args.model, args.ctx_size, type_k=args.cache_type_k, type_v=args.cache_type_v), args.json)


def doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor as run

    return _print(run(), args.json)


def demo_model(args: argparse.Namespace) -> int:
    from .fetch import SMOLLM2, fetch

    put(fetch(SMOLLM2, _say))
    return 0


def texts(args: argparse.Namespace) -> int:
    from . import texts as library

    wanted = list(library.TEXTS) if "all" in args.names else args.names
    found = [library.find(name) for name in dict.fromkeys(wanted)] or list(library.TEXTS.values())
    paths = [str(library.save(text.name, _say)) for text in found] if wanted else []
    if args.json:
        put(json.dumps([text.to_json() for text in found], indent=2))
    else:
        put("\n".join(paths or [text.render() for text in found]))
    return 0


def lm_eval(args: argparse.Namespace) -> int:
    from .evals.lm_eval_run import evaluate

    gc.enable()  # a run of hours makes cycles
    threads = {} if args.threads is None else {"n_threads": args.threads, "n_threads_batch": args.threads}
    done = evaluate(
        args.model, [name.strip() for name in args.tasks.split(",") if name.strip()], include_path=args.include_path,
        limit=args.limit, num_fewshot=args.num_fewshot, apply_chat_template=args.apply_chat_template,
        gen_kwargs=args.gen_kwargs, out=args.output, say=_say, n_ctx=args.n_ctx or None, method=args.method,
        scale=args.scale, **threads,
    )  # fmt: skip
    put(done.render())
    for path in done.files:
        _say(f"wrote {printable(str(path))}")
    return 0


def eval(args: argparse.Namespace) -> int:
    from .verbs_eval import run

    gc.enable()
    return run(args)


def report(args: argparse.Namespace) -> int:
    from .evals.report import report as run

    done = run(args.dir, args.out, bucket=args.bucket)
    for line in filter(None, done.missing.split("\n")):
        _say(line)
    if done.summary.results.skipped:
        _say(f"left out, cut off or no results: {done.summary.results.skipped} of the results' lines")
    return _print(done, args.json)


def figure(args: argparse.Namespace) -> int:
    from .verbs_figures import figure as run

    return run(args, _say)


def demo(args: argparse.Namespace) -> int:
    from .demo import demo as run

    put(run(Path(args.out), n_ctx=args.ctx_size, n_needles=args.needles, n_threads=args.threads, say=_say))
    return 0


def build(args: argparse.Namespace) -> int:
    from .engine import store

    if args.list:
        return _list_engines(args.json)
    if args.remove:
        for engine in store.remove(args.remove):
            _say(f"removed {engine.key}")
        return 0
    from .engine.build import build as run

    with _LateBar("compiling", ("files", 1)) as bar:
        engine = run(
            backend=args.backend, rpc=args.rpc, server=args.server, tests=args.tests, native=args.native,
            release=args.pin, source=args.source, jobs=args.jobs, say=_say, progress=bar,
        )  # fmt: skip
    if args.server and args.page:
        from .engine.page import add_page

        add_page(engine, Path(args.source) if args.source else None, _say)
    if args.json:
        put(json.dumps(_engine_json(engine), indent=2))
    else:
        put(engine.path)
    return 0


def _list_engines(as_json: bool) -> int:
    from .engine import binding_version, find, store
    from .engine.programs import page_of

    found = store.installed()
    if as_json:
        put(json.dumps([_engine_json(engine) for engine in found], indent=2))
        return 0
    binding = binding_version()
    for engine in found:
        there = [word for word in ("rpc", "server", "tests") if getattr(engine, word)]
        parts = ", ".join([*there, *(["web page"] if page_of(engine) else [])])
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime(engine.built))
        size = f"{engine.size / 1e6:.0f} MB"
        put(f"{engine.key}  {find.state(engine, binding)}, {size}, built {age}  {parts}")
        put(f"  {engine.path}")
    if not found:
        _say("nothing is built yet: `mrrope build`")
    return 0


def _engine_json(engine: Engine) -> dict[str, object]:
    from .engine import binding_version, find

    values = {name: getattr(engine, name) for name in engine.__dataclass_fields__}
    paths = {"path": str(engine.path), "lib": str(engine.lib), "bin": str(engine.bin)}
    return {**values, **paths, "state": find.state(engine, binding_version()), "size": engine.size}


class _LateBar(Bar):
    """A bar whose clock starts with the first report: what goes before says how far it is in other ways."""

    def __call__(self, done: int, total: int) -> None:
        if not self.drawn:
            self.start = time.monotonic()
        super().__call__(done, total)


def _print(report: _Report, as_json: bool) -> int:
    put(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    return 0


def _told(done: Extended) -> list[str]:
    t = done.table
    verb = "would write" if done.written is None else "wrote"
    lines = [
        f"{printable(done.source.name)}: {done.arch}, {t.n_ctx_orig} tokens -> {done.n_ctx}",
        f"  table      {t.method}, S = {t.scale:g}, pairs {t.d_l} to {t.d_h} of {t.n_rot // 2}, "
        f"attn_factor {t.attn_factor:.4f}",
        f"  rendering  {done.rendering.kind}: {done.rendering.why}",
    ]
    if done.rendering.kind == "engine":
        lines.append(
            "             stock llama.cpp does not read this table; `mrrope inspect` says what it does instead"
        )
    if done.rendering.reexpress:
        lines.append("             a LoRA made for the original does not fit this file")
    if done.replaced:
        lines.append("  replaces   the table this file was extended with before")
    lines.append(f"  {verb:<10} {printable(done.path.name)}{', ' + _how(done.written) if done.written else ''}")
    if done.elsewhere:
        lines.append(f"             {done.elsewhere}")
    if done.written is None and done.path != done.source and done.path.exists():
        lines.append("             it exists: --force overwrites it")
    if done.written is None:
        lines.append(f"  keys       {', '.join(done.keys)}")
    else:
        lines.append(f"  undo       mrrope revert {printable(shlex.quote(str(done.path)), limit=1000)}")
    return lines


def _how(written: WriteReport) -> str:
    return f"{written.size / 1e6:.1f} MB by {written.how} in {written.seconds:.2f} s"
