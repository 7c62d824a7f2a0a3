"""`mrrope demo`: a real model, extended to 32K and seen to work past its old window. Every figure is measured here.

SmolLM2-135M-Instruct remembers 8192 tokens. The demo extends the file four times, reads the same public-domain
article with both, and asks both for a number hidden in a text longer than the original can hold.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engine
from .aside import written_aside
from .errors import MrropeError
from .evals.losses import buckets, perplexity, token_nll
from .evals.needles import KEYS, ROOM, Answer, ask, haystack
from .fetch import BRITANNICA, SMOLLM2, Say, article, fetch
from .progress import Bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .extend import Extended

N_CTX_ORIG, SCALE = 8192, 4.0
HAYSTACK = 12288  # tokens of the text the needles are hidden in
_BUCKET = 1024  # tokens a point of the plot


@dataclass(frozen=True)
class Run:
    """What one model did: losses by position, float32 (n,), and its answers."""

    name: str
    losses: NDArray[np.float32]
    answers: list[Answer]
    seconds: float


def demo(out: Path, *, n_ctx: int = 12288, n_needles: int = 1, n_threads: int | None = None, say: Say = print) -> str:
    """Extend SmolLM2 to 32K, measure both files over `n_ctx` tokens, and write the plots into `out`.

    n_needles: numbers hidden in one text of about 12K tokens, 1 to 10, each asked for by RULER's question.
    Returns the table to print. Raises MrropeError for an n_ctx that does not lie past the original window and within
    the new one, and for another number of needles.
    """
    started = time.monotonic()
    _check(n_ctx, n_needles)
    engine.announce(say)
    original, text = fetch(SMOLLM2, say), article(fetch(BRITANNICA, say))
    out.mkdir(parents=True, exist_ok=True)
    extended = _extend(original, out, say)
    runs = []
    for name, path in (("original", original), ("extended", extended.path)):
        say(f"{name}: reads {n_ctx} tokens of an article, then looks for numbers hidden in {HAYSTACK} tokens")
        runs.append(_measure(name, path, text, n_ctx, n_needles, n_threads))
        say(f"{name}: {runs[-1].seconds:.0f} s")
    report = _report(extended, runs, n_ctx)
    _plot(extended, runs, out)
    _keep(extended, runs, n_ctx, out)
    say(f"done in {time.monotonic() - started:.0f} s; plots and figures in {out}/")
    return report


def _check(n_ctx: int, n_needles: int) -> None:
    longest = round(N_CTX_ORIG * SCALE)
    if not HAYSTACK <= n_ctx <= longest:
        raise MrropeError(
            f"--ctx-size {n_ctx} shows nothing",
            why=f"the needles' text has {HAYSTACK} tokens and the extended model remembers {longest}",
            fix=f"leave it out for {HAYSTACK}",
        )
    if not 1 <= n_needles <= len(KEYS):
        raise MrropeError(f"--needles {n_needles}", why=f"there are {len(KEYS)} keys", fix=f"1 to {len(KEYS)}")


def _extend(original: Path, out: Path, say: Say) -> Extended:
    from .extend import extend
    from .naming import with_context

    dst = out / f"{with_context(original.stem, round(N_CTX_ORIG * SCALE))}.gguf"
    done = extend(original, dst, scale=SCALE, force=True)
    if done.written:
        say(f"mrrope extend: {dst} written by {done.written.how} in {done.written.seconds:.2f} s")
    return done


def _measure(name: str, path: Path, text: str, n_ctx: int, n_needles: int, n_threads: int | None) -> Run:
    from .model import load

    started = time.monotonic()
    threads: Any = {"n_threads": n_threads, "n_threads_batch": n_threads}
    # plain attention reads long prompts faster than flash attention on a CPU
    elastic = None if engine.has_elastic() else False
    llm: Any = load(path, n_ctx=n_ctx, past_window=True, flash_attn=False, elastic=elastic, **threads)
    try:
        tokens = llm.tokenize(text.encode(), add_bos=True, special=False)[:n_ctx]
        with Bar(f"{name}, article", ("tok", 1)) as bar:
            losses = token_nll(llm, tokens, bar)
        hay = haystack(llm, HAYSTACK - ROOM, KEYS[:n_needles])
        with Bar(f"{name}, needle", ("tok", 1)) as bar:
            answers = ask(llm, hay, bar)
    finally:
        llm.close()
    return Run(name, losses, answers, time.monotonic() - started)


def _report(extended: Extended, runs: list[Run], n_ctx: int) -> str:
    table, window = extended.table, extended.table.n_ctx_orig
    rows = [
        ("", *(run.name for run in runs)),
        ("remembers, tokens", f"{window}", f"{extended.n_ctx}"),
        (f"perplexity, tokens 0 to {window}", *(f"{perplexity(r.losses, 0, window):.2f}" for r in runs)),
        (f"perplexity, tokens {window} to {n_ctx}", *(f"{perplexity(r.losses, window):.2f}" for r in runs)),
        (
            f"numbers recalled, {HAYSTACK // 1024}K tokens",
            *(f"{sum(a.exact for a in r.answers)} of {len(r.answers)}" for r in runs),
        ),
        ("loss of the right answer, nats", *(f"{_mean_loss(r):.2f}" for r in runs)),
        ("seconds", *(f"{run.seconds:.0f}" for run in runs)),
    ]
    lines = [f"{left:<36}{a:>12}{b:>12}" for left, a, b in rows]
    runs_on = f"{engine.loaded_library().kind} llama.cpp on the CPU"
    mode = "elastic" if engine.has_elastic() else "static table"
    head = f"SmolLM2-135M-Instruct Q4_1, {table.method}, S = {table.scale:g}, {mode}, {runs_on}"
    return "\n".join([head, "", *lines, "", *_question(runs)])


def _question(runs: list[Run]) -> list[str]:
    """The needle that lies farthest back, and what each model said of it."""
    first = runs[0].answers[0]
    lines = [f"Token {first.position} says that the number for {first.key!r} is {first.expected}. Asked at the end:"]
    return lines + [f"  {run.name:<10} {run.answers[0].said!r}" for run in runs]


def _mean_loss(run: Run) -> float:
    return sum(a.loss for a in run.answers) / len(run.answers)


def _plot(extended: Extended, runs: list[Run], out: Path) -> None:
    from .plots import plot_factors, plot_perplexity

    plot_factors([extended.table], out / "factors.png")
    series = {run.name: buckets(run.losses, _BUCKET) for run in runs}
    plot_perplexity(series, extended.table.n_ctx_orig, out / "perplexity.png")


def _keep(extended: Extended, runs: list[Run], n_ctx: int, out: Path) -> None:
    """The figures as JSON and every loss as an array, for whoever wants to look closer."""
    import numpy as np

    answers = {run.name: [asdict(answer) for answer in run.answers] for run in runs}
    facts = {"model": SMOLLM2.filename, "text": BRITANNICA.filename, "n_ctx": n_ctx, "method": extended.table.method}
    with written_aside(out / "demo.json") as aside:
        aside.write_text(json.dumps({**facts, "scale": extended.table.scale, "needles": answers}, indent=2))
    with written_aside(out / "losses.npz") as aside:
        np.savez(aside, original=runs[0].losses, extended=runs[1].losses)
