"""How many tokens of context a chat gets, and by which table: decided from the header, before anything is loaded."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ..errors import Refused
from ..extend import method_table
from ..facts import obstacle
from ..tables import DEFAULT_METHOD
from ..text import printable
from .options import Options
from .target import Remembered, Target

METHODS = ("mrrope-uni", "mrrope-pro")  # those the patched engine applies by itself
TURN = 256  # tokens that a question and its answer should find room for, at the least
TALK = 1024  # the same of a conversation, where chat itself chooses the context
_STEP = 256
_MOST = 1 << 20


@dataclass(frozen=True)
class Plan:
    """`scaling` is the table that chat applies itself, at `scale`; None leaves the file's own settings."""

    n_ctx: int
    scaling: str | None = None
    scale: float = 1.0


class NeedsExtending(Refused):
    """The file must be extended to `n_ctx` tokens first: this engine does not apply a table to it."""

    def __init__(self, what: str, *, why: str, fix: str, n_ctx: int, method: str) -> None:
        super().__init__(what, why=why, fix=fix)
        self.n_ctx = n_ctx
        self.method = method


def plan(target: Target, options: Options, need: int, before: Remembered | None, *, patched: bool) -> Plan:
    """The context for `need` tokens of documents and question, an answer's room included.

    `before`: the conversation that goes on, whose context is kept unless -c says another. `patched`: the engine
    applies tables. Raises Refused where it does not fit the context that was asked for, or the file has less and no
    table can be applied; NeedsExtending where `mrrope extend` is the way.
    """
    if target.method is not None:
        return _extended(target, options, need, before)
    own, kept_method = target.n_ctx, before.method if before and before.n_ctx > target.n_ctx else None
    method = options.method or kept_method or DEFAULT_METHOD
    scale = options.scale
    if scale is None and options.n_ctx == 0 and before and kept_method == method:
        n_ctx, scale = before.n_ctx, before.scale
    elif options.n_ctx:
        n_ctx = options.n_ctx
    elif scale is not None:
        n_ctx = int(own * scale + 0.5)
    else:
        n_ctx = own if need <= own else _grown(own, need + TALK)
    _check_room(target, need, n_ctx, fix=f"-c {_rounded(need + TALK)}, or without -c")
    if n_ctx <= own and scale is None:
        return Plan(n_ctx)
    scale = n_ctx / own if scale is None else scale
    if scale <= 1 or n_ctx > own * scale + 0.5:
        raise Refused(
            f"{target.name}: --scale {scale:g} does not make {n_ctx} tokens",
            why=f"the model has {own}, and {scale:g} times as many are {int(own * scale)}",
            fix=f"--scale {-(-n_ctx // own) if n_ctx > own else 2:g}, or leave --scale or -c out",
        )
    _check_table(target, method, scale)
    if not patched:
        raise _extend_first(target, int(own * scale + 0.5), method, options)
    return Plan(n_ctx, method, scale)


def _extended(target: Target, options: Options, need: int, before: Remembered | None) -> Plan:
    if options.scale is not None or options.method is not None:
        flag = "--scale" if options.scale is not None else "--method"
        raise Refused(
            f"{target.name}: {flag} is for files that were not extended",
            why=f"this one holds a {printable(target.method or '')} table for {target.n_ctx} tokens",
            fix=f"leave {flag} out, or `mrrope revert` the file first",
        )
    kept = before.n_ctx if before and 0 < before.n_ctx <= target.n_ctx else 0
    n_ctx = options.n_ctx or (kept if need <= kept else 0) or target.n_ctx
    further = f"`mrrope extend {quoted(target)} --ctx {_grown(target.n_ctx_orig, need + TALK)}`"
    if n_ctx > target.n_ctx:
        further = f"`mrrope extend {quoted(target)} --ctx {n_ctx}`"
        raise Refused(
            f"{target.name}: {n_ctx} tokens of context, and the file has {target.n_ctx}",
            why="its table was made for so many",
            fix=f"-c {target.n_ctx}, or {further} for a longer one",
        )
    fits = need <= target.n_ctx
    wanted = min(_rounded(need + TALK), target.n_ctx)
    _check_room(target, need, n_ctx, fix=f"-c {wanted}, or without -c" if fits else further)
    return Plan(n_ctx)


def _check_room(target: Target, need: int, n_ctx: int, *, fix: str) -> None:
    if need > n_ctx:
        raise Refused(
            f"{target.name}: what is to be read does not fit in the context",
            why=f"documents, question and a short answer are about {need} tokens, and the context has {n_ctx}",
            fix=fix,
        )


def _check_table(target: Target, method: str, scale: float) -> None:
    """Refused, with the reason, where no table can be made for this model."""
    if refusal := obstacle(target.facts, target.name):
        raise refusal
    method_table(target.facts, target.name, method, scale)


def _extend_first(target: Target, n_ctx: int, method: str, options: Options) -> NeedsExtending:
    from .. import engine

    because, fix = engine.why_stock()
    command = f"mrrope extend {quoted(target)} --ctx {n_ctx} --method {method}"
    return NeedsExtending(
        f"{target.name}: {n_ctx} tokens of context, and the file has {target.n_ctx}",
        why=f"only the patched engine applies a table to a file as it is: {because}",
        fix=f"`{command}` and chat with the new file, or {fix}",
        n_ctx=n_ctx,
        method=method,
    )


def quoted(target: Target) -> str:
    """The file for a command line."""
    return printable(shlex.quote(str(target.path)), limit=1000)


def _grown(own: int, n: int) -> int:
    """The model's context, doubled until n tokens fit: the same for texts of about the same length.

    >>> _grown(8192, 8193), _grown(8192, 20000)
    (16384, 32768)
    """
    grown = max(own, 1)
    while grown < n and grown < _MOST:
        grown *= 2
    return max(grown, _rounded(n))


def _rounded(n: int) -> int:
    return -(-n // _STEP) * _STEP
