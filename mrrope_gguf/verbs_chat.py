"""The verbs around a conversation: what each does with its arguments. See verbs.py."""

from __future__ import annotations

import argparse

from .progress import Bar
from .said import put, say


def export(args: argparse.Namespace) -> int:
    from .export import export as run

    with Bar("copying", ("MB", 1e6)) as bar:
        done = run(args.target, args.model, args.out, n_ctx=args.ctx_size, force=args.force, progress=bar)
    for note in done.notes:
        say(note)
    put(done.text)
    return 0


def chat(args: argparse.Namespace) -> int:
    import gc

    from .chat.options import from_args
    from .chat.run import chat as run

    gc.enable()  # a conversation may last
    return run(from_args(args))
