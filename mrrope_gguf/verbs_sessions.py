"""`mrrope sessions list|show|rm`: what chats have kept on disk."""

from __future__ import annotations

import argparse
import json

from .said import put
from .said import say as _say
from .sessions import manage
from .sessions.store import LIMIT, Store, limit_words
from .text import printable


def sessions(args: argparse.Namespace) -> int:
    """Run one of the three; `args` as cli.py parses them."""
    store = Store()
    if args.action == "show":
        return _show(store, args.name, args.json)
    if args.action == "rm":
        gone = manage.remove(store, args.names)
        for name in gone:
            _say(f"removed {printable(name)}")
        if not gone:
            _say("there was nothing to remove")
        return 0
    return _list(store, getattr(args, "json", False))


def _list(store: Store, as_json: bool) -> int:
    found = manage.sessions(store)
    if as_json:
        put(json.dumps([one.to_json() for one in found], indent=2))
        return 0
    for one in found:
        put(one.render())
    total = sum(one.size for one in found)
    _say(f"{limit_words(total)} of {limit_words(store.limit)} ({LIMIT}) in {printable(str(store.folder))}")
    return 0


def _show(store: Store, name: str, as_json: bool) -> int:
    values = manage.show(store, name)
    if as_json:
        put(json.dumps(values, indent=2))
        return 0
    for part in ("file", "model", "tokens", "scale", "n_ctx", "size", "trouble"):
        if part in values:
            _say(f"{part:<8} {printable(str(values[part]), limit=1000)}")
    for document, text in values.get("documents", []):
        _say(f"document {printable(document) or '(no name)'}, {len(text)} characters")
    for message in values.get("messages", []):
        put(f"{message['role']}:\n{_lines(message['content'])}\n")
    return 0


def _lines(text: str) -> str:
    """Text a model wrote, which may hold terminal escapes, line by line."""
    return "\n".join(printable(line, limit=1 << 20) for line in text.split("\n"))
