"""What the results in a folder belong to: model, engine, tables, texts and settings, in the log's `#head` lines.

A command given again goes on where it stopped only if all of these are what they were; new ways and texts may join.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..facts import RopeFacts, read_facts
from ..gguf.digest import source_digest
from ..gguf.source import Source
from ..text import printable
from .runlog import RunLog
from .ways import Way, reach

HEAD, VERSION = "#head", 1
GROWING = ("ways", "texts")  # parts of a head that may gain names

Head = dict[str, Any]


def model_identity(path: str | os.PathLike[str], *, force: bool = False) -> dict[str, object]:
    """name, sha256, n_ctx_orig (ways.reach) and arch of a model; an extended file's are those of its original.

    The sha256 is not the file's. It is taken of each shard's size, header and data, and of data of more than 64 MiB
    only 64 evenly spread MiB are read, the first and the last among them, so that 40 GB take a moment: a file whose
    header and size are the same, and which differs between the samples alone, is taken for the same.
    Raises BadFile, Refused or FileTrouble as Source.open and read_facts do.
    """
    with Source.open(path) as source:
        facts = read_facts(source.index)
        name, digest = printable(Path(path).name), source_digest(source)
        return {"name": name, "sha256": digest, "n_ctx_orig": reach(facts, force=force), "arch": facts.arch.name}


def text_sha256(text: str | bytes) -> str:
    """sha256 of a text, UTF-8 if it is a str."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def engine_identity() -> str:
    """The library of this process: kind, version, commit and devices, but not where it lies."""
    from .. import engine

    library = engine.loaded_library()
    words = [library.kind, "llama.cpp", library.version, library.commit]
    return f"{' '.join(filter(None, words))} on {', '.join(library.devices)}"


def make_head(
    model: Mapping[str, object], facts: RopeFacts, ways: Iterable[Way], *, engine: str, scale: float | None,
    texts: Mapping[str, str], settings: Mapping[str, object], force: bool = False,
) -> Head:  # fmt: skip
    """The head of a results file: plain values, ready for JSON. texts: {name: sha256}."""
    tables = {way.name: way.to_json(facts, force=force) for way in ways}
    return {
        "version": VERSION, "model": dict(model), "engine": engine, "scale": scale, "ways": tables,
        "texts": dict(texts), "settings": dict(settings),
    }  # fmt: skip


def check(before: Head, now: Head, where: str = "these results") -> Head:
    """What must be added to the head `before` for runs of `now` to join: its new ways and texts.

    The model's name alone may differ: a file may be moved. A part that `now` does not mention stays as it was.
    Raises Refused that names everything else that changed, with the value before and now.
    """
    changes = list(_changes(before, now))
    if changes:
        raise Refused(
            f"{where}: they belong to something else",
            why="; ".join(changes),
            fix="give a new --out folder, or the same model, texts and settings again",
        )
    return {part: {k: v for k, v in now[part].items() if k not in before.get(part, {})} for part in GROWING}


def read_head(log: RunLog) -> Head | None:
    """The head of a results file with all that joined it since, or None where there is none."""
    return head_of(log.runs())


def open_head(log: RunLog, now: Head) -> Head:
    """Write the head of a new results file, or see that `now` may go on with an old one and add what joins it.

    Returns the whole head. Raises Refused as `check` does, and for results without a head.
    """
    now = json.loads(json.dumps(now))  # what a log would give back
    runs = log.runs()
    before, where = head_of(runs), printable(str(log.path))
    if before is None:
        if runs:
            raise Refused(
                f"{where}: nothing says what these results belong to",
                why=f"it holds {len(runs)} results and no {HEAD} line",
                fix="give a new --out folder",
            )
        log.add(HEAD, now)
        return open_head(log, now)  # another process may have been first
    new = check(before, now, where)
    if any(new.values()):
        log.add(f"{HEAD}/{text_sha256(json.dumps(new))[:12]}", new)
        return open_head(log, now)
    return before


def head_of(runs: Mapping[str, dict[str, Any]]) -> Head | None:
    """The same of runs that were read already. A part that is no table of names counts as empty."""
    if HEAD not in runs:
        return None
    head = dict(runs[HEAD])
    for key, added in runs.items():
        if key.startswith(f"{HEAD}/"):
            head |= {part: {**_names(head.get(part)), **_names(added.get(part))} for part in GROWING}
    return head


def _names(part: object) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def _changes(before: Head, now: Head) -> Iterable[str]:
    """One phrase for each thing that is not what it was."""
    if before.get("version") != now["version"]:
        yield f"the file's version was {_shown(before.get('version'))} and is {now['version']}"
        return
    for part in ("engine", "scale"):
        if before[part] != now[part]:
            yield f"the {part} was {_shown(before[part])} and is {_shown(now[part])}"
    then, here = before["model"], now["model"]
    for fact in sorted({*then, *here} - {"name"}):
        if then.get(fact) != here.get(fact):
            named = f"the model {printable(str(here.get('name')))}: its {fact}"
            yield f"{named} was {_shown(then.get(fact))} and is {_shown(here.get(fact))}"
    for part, singular in (("ways", "way"), ("texts", "text"), ("settings", "setting")):
        old, new = before[part], now[part]
        for name in [*new, *(old.keys() - new.keys() if part == "settings" else ())]:
            if (name in old or part == "settings") and old.get(name) != new.get(name):
                yield from _difference(f"the {singular} {name}", old.get(name), new.get(name))


def _difference(name: str, old: Any, new: Any) -> Iterable[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{name} was {_shown(old)} and is {_shown(new)}"
        return
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield f"{name}: its {key} was {_shown(old.get(key))} and is {_shown(new.get(key))}"


def _shown(value: Any) -> str:
    """A value in an error: a hash by its beginning."""
    if value is None:
        return "not set"
    text = printable(str(value))
    return f"{text[:12]}..." if len(text) == 64 and not set(text) - set("0123456789abcdef") else text
