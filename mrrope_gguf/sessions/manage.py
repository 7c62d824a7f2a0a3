"""What is kept, for people: conversations by name and saved states without one; shown and removed."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileTrouble, Refused
from ..gguf.stage import delete
from ..text import printable
from .named import Named, check_name, named_files, read_named
from .store import Entry, Store, limit_words


@dataclass(frozen=True)
class Listed:
    """A conversation, or a saved state that no conversation names. `size`: bytes of its files; `when`: last used."""

    name: str
    named: bool
    model: str
    tokens: int
    size: int
    when: float
    trouble: str = ""

    def to_json(self) -> dict[str, object]:
        return {**vars(self)}

    def render(self) -> str:
        """One line.

        >>> Listed("book", True, "m.gguf", 24000, 553_000_000, 0.0).render()[:40]
        'book                      24000 tokens  '
        """
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        what = self.trouble or f"{self.tokens:>7} tokens  {limit_words(self.size):>8}  {day}  {self.model}"
        return f"{printable(self.name):<20}  {'  ' if self.named else '- '}{what}"


def sessions(store: Store) -> list[Listed]:
    """All there is: conversations by name, then states without one, the last used first."""
    states = {_place(entry.path): entry for entry in store.entries()}
    found, used = [], set()
    for name, path in named_files(store.folder / "named"):
        listed, state = _listed(store, name, path, states)
        found.append(listed)
        used.add(state)
    for place, entry in reversed(states.items()):
        if place not in used:
            head = store.head(entry.path)
            model, n = (head.model, len(head.tokens)) if head else ("", 0)
            trouble = "" if head else "damaged, or of another version or user"
            found.append(Listed(entry.path.stem[:12], False, model, n, entry.size, entry.used, trouble))
    return found


def show(store: Store, name: str) -> dict[str, Any]:
    """A conversation whole, or what a state says about itself, as plain values. Raises Refused for a name unknown."""
    for known, path in named_files(store.folder / "named"):
        if known == name:
            return {**(read_named(path) or {}), "file": str(path)}
    entry = _state(store, name)
    head = store.head(entry.path)
    if head is None:
        return {"file": str(entry.path), "trouble": "damaged, or of another version or user"}
    return {
        "file": str(entry.path), "model": head.model, "tokens": len(head.tokens), "scale": head.scale,
        "size": entry.size, "whole": head.whole, "parts": dict(head.parts),
    }  # fmt: skip


def remove(store: Store, names: list[str]) -> list[str]:
    """Remove conversations with their states, or states by the name that `sessions` lists; 'all': everything.

    Returns what was removed. Raises Refused for a name that is unknown or in use; nothing is removed then, but with
    'all' what is in use stays and the rest goes.
    """
    if "all" in names:
        return _remove_all(store)
    known = dict(named_files(store.folder / "named"))
    held = [Named(store.folder / "named", name) for name in names if name in known and _can_be_held(name)]
    try:
        states = [_state(store, name) for name in names if name not in known]
        for named in held:
            states += _own_states(store, named.path)
            named.remove()
        for name in names:
            if name in known:
                delete(known[name])
        for entry in states:
            store.discard(entry.path)
    finally:
        for named in held:
            named.close()
    return names


def _listed(store: Store, name: str, path: Path, states: dict[str, Entry]) -> tuple[Listed, str]:
    size = path.stat().st_size
    try:
        values = read_named(path) or {}
        state = str(values.get("state", ""))
        size += states[state].size if state in states else 0
        return (
            Listed(name, True, printable(str(values.get("model", ""))), int(values["tokens"]), size, values["saved"]),
            state,
        )
    except (FileTrouble, KeyError, TypeError, ValueError):
        return Listed(name, True, "", 0, size, path.stat().st_mtime, "damaged, or of another version"), ""


def _own_states(store: Store, path: Path) -> list[Entry]:
    """The state of a conversation, unless another one points to it too."""
    pointed = [state for _, other in named_files(store.folder / "named") if (state := _points_to(other))]
    mine = _points_to(path)
    return [entry for entry in store.entries() if _place(entry.path) == mine and pointed.count(mine) == 1]


def _points_to(path: Path) -> str:
    with suppress(FileTrouble):
        return str((read_named(path) or {}).get("state", ""))
    return ""


def _remove_all(store: Store) -> list[str]:
    gone = []
    for name, path in list(named_files(store.folder / "named")):
        with suppress(Refused):
            if _can_be_held(name):
                held = Named(store.folder / "named", name)
                held.remove()
                held.close()
            else:
                delete(path)
            gone.append(name)
    for entry in store.entries():
        if store.discard(entry.path):
            gone.append(entry.path.stem[:12])
            with suppress(OSError):
                entry.path.parent.rmdir()
    return gone


def _can_be_held(name: str) -> bool:
    """Whether it is a name: somebody may have put other files there."""
    try:
        check_name(name)
    except Refused:
        return False
    return True


def _state(store: Store, name: str) -> Entry:
    """The one state whose file begins with `name`."""
    fitting = [entry for entry in store.entries() if len(name) >= 4 and entry.path.stem.startswith(name)]
    if len(fitting) != 1:
        raise Refused(
            f"{printable(name)!r} names {'several saved states' if fitting else 'no session'}",
            why=f"{len(fitting)} fit" if fitting else f"none in {printable(str(store.folder))} has this name",
            fix="`mrrope sessions list` shows the names",
        )
    return fitting[0]


def _place(path: Path) -> str:
    """How a conversation points to a state."""
    return f"{path.parent.name}/{path.name}"
