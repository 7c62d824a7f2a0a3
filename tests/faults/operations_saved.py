"""The operations that faults are made in: saved sessions, the results and states of an evaluation."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.evals.suite import NAME
from mrrope_gguf.sessions.entry import Head
from mrrope_gguf.sessions.named import Named, read_named
from mrrope_gguf.sessions.reader import Reader
from mrrope_gguf.sessions.store import Store
from tests import eval_suite
from tests.faults.injector import Mode
from tests.faults.operation import Met, Operation, contents, fill
from tests.session_chat import open_small, small
from tests.session_states import TEXT, keep, refused

_SHORT, _LONG = 100, 160  # tokens


class Sessions(Operation):
    """A conversation goes on from a saved state, saves a longer one and its own file; another is there already.

    The states and the conversation that were there stay whole. What is left over goes when it is a minute old.
    """

    new_store = False

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        aside = place.with_name(f"{place.name}.aside")
        aside.mkdir(parents=True, exist_ok=True)
        self.folder = place / "sessions"
        self.llm = open_small(small(aside, n_layer=1), flash_attn=True)
        fill(place, {})
        if not self.new_store:
            keep(self.llm, self.folder, TEXT[:_SHORT])
            self._talk(1)
        self.start = {
            path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()
        }
        self.before = contents(place)

    def prepare(self) -> None:
        fill(self.place, {})
        for name, data in self.start.items():
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_bytes(data)
            path.chmod(0o600)

    def _talk(self, n_messages: int) -> None:
        named = Named(self.folder / "named", "talk")
        try:
            named.load()
            messages = [{"role": ("user", "assistant")[i % 2], "content": f"word {i} " * 40} for i in range(n_messages)]
            plain: dict[str, Any] = {"documents": [], "pieces": [], "sampling": {}, "parts": {}}
            named.save({"system": None, "created": 1.0, "tokens": n_messages, "messages": messages, **plain})
        finally:
            named.close()

    def act(self) -> None:
        self._converse(_LONG)

    def _converse(self, n_tokens: int) -> None:
        notes: list[str] = []
        reader = Reader(self.llm, Store(self.folder, note=notes.append), notes.append)
        reader.memory.clear()
        assert reader.bring(TEXT[:n_tokens])
        saved = reader.save()
        self._talk(3)
        if not saved:  # the conversation goes on all the same, and is told so
            raise FileTrouble("; ".join(notes))

    def again(self) -> None:
        a_minute_later(self.place)
        self._converse(_LONG + 40)

    def finished(self) -> None:
        pass

    def look(self, met: Met, mode: Mode) -> list[str]:
        # a state that a longer one of the same conversation stands for may go
        found, longer = contents(self.place), len(list(self.folder.glob("states/*/*.state"))) > 0
        wrong = [
            f"{name} is lost"
            for name, digest in self.before.items()
            if found.get(name) != digest
            and not name.endswith((".json", ".lock"))
            and not (name.endswith(".state") and name not in found and longer)
        ]
        return wrong + self._whole()

    def _whole(self) -> list[str]:
        wrong = []
        for path in self.folder.glob("states/*/*.state"):
            if why := refused(path, (self.folder / "key").read_bytes()):
                wrong.append(f"{path.name} is refused: {why}")
        talk = read_named(self.folder / "named" / "talk.json")
        if talk is None and not self.new_store:
            wrong.append("the conversation is gone")
        if talk is not None and len(talk["messages"]) not in (1, 3):
            wrong.append(f"the conversation has {len(talk['messages'])} messages")
        return wrong

    def recovered(self) -> list[str]:
        # a state that could not be read was read again, and goes when the room is needed
        found = {name for name in contents(self.place) if not name.endswith(".state")}
        wanted = {"sessions/key", "sessions/named/talk.json", "sessions/named/talk.lock"}
        wrong = [] if found == wanted else [f"there is {sorted(found)}, not {sorted(wanted)}"]
        longest = max(len(head.tokens) for path in self.folder.glob("states/*/*.state") if (head := self._head(path)))
        return wrong + self._whole() + ([] if longest == _LONG + 40 else [f"the longest state has {longest} tokens"])

    def _head(self, path: Path) -> Head | None:
        return Store(self.folder).head(path)

    def close(self) -> None:
        self.llm.close()


class SessionsNew(Sessions):
    """The same where there was nothing before: the folders and the user's key are made."""

    new_store = True


def a_minute_later(folder: Path) -> None:
    """Temporary files that nobody has locked are left over after that."""
    for path in folder.rglob(".*.tmp"):
        os.utime(path, (time.time() - 120, time.time() - 120))


class Evaluation(Operation):
    """`mrrope eval` goes on with results that are there: whole lines stay, the others are measured to the same bits."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        aside = place.with_name(f"{place.name}.aside")
        aside.mkdir(parents=True, exist_ok=True)
        self.model = eval_suite.model(aside, n_layer=1)
        text = eval_suite.prose(aside / "t.txt", 300)
        self.asked = eval_suite.request("ppl", "none,yarn", (512,), texts=(str(text),))
        os.environ["MRROPE_CACHE"] = str(place / "cache")
        self.out = place / "out"
        self.start: dict[str, bytes] = {}
        fill(place, {})
        self.act()
        lines = (self.out / NAME).read_bytes().splitlines(keepends=True)
        self.start = {"out/" + NAME: b"".join(lines[:2])}
        self.kept = [json.loads(line)["run"] for line in lines[:2]]
        self.cells = RunLog(self.out / NAME).runs()

    def prepare(self) -> None:
        fill(self.place, {})
        for name, data in self.start.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(data)

    def act(self) -> None:
        eval_suite.run(self.model, self.asked, self.out)

    def again(self) -> None:
        a_minute_later(self.place)
        self.act()

    def finished(self) -> None:
        assert RunLog(self.out / NAME).runs() == self.cells

    def look(self, met: Met, mode: Mode) -> list[str]:
        found = RunLog(self.out / NAME).runs()
        wrong = [f"{key} is lost" for key in self.kept if key not in found]
        return wrong + [f"{key} is not what was measured" for key in found if found[key] != self.cells.get(key)]

    def recovered(self) -> list[str]:
        wrong = [] if RunLog(self.out / NAME).runs() == self.cells else ["the results are not what one run gives"]
        left = set(contents(self.place)) - {"out/" + NAME, "cache/evals/key"}
        return [*wrong, f"left over: {sorted(left)}"] if left else wrong

    def close(self) -> None:
        with suppress(KeyError):
            del os.environ["MRROPE_CACHE"]
