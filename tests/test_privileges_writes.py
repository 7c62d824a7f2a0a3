"""Every verb under a recorder: what it opens for writing lies in the cache, the data folder or where it was told to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import recorder, tiny
from tests.eval_suite import prose
from tests.patched import ROOT
from tests.session_chat import BOOK, small

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.name != "posix", reason="paths are POSIX's")]
# matplotlib's own cache of fonts
PLOTS = ("home/.cache", "home/.config", "home/.cache/matplotlib", "home/.config/matplotlib")


@dataclass
class Place:
    """A folder of its own for everything a verb may know of: home, temporary files, cache, data, models, output."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("home", "tmp", "cache", "data", "models", "out", "work"):
            (self.root / name).mkdir()
        small(self.root / "models")
        prose(self.root / "models" / "t.txt", 400)
        (self.root / "models" / "book.txt").write_text(BOOK)

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
        places = {"HOME": "home", "TMPDIR": "tmp", "MRROPE_CACHE": "cache", "MRROPE_DATA": "data"}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"MRROPE_ENGINE": "stock", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
        return {**kept, **{name: str(self.root / folder) for name, folder in places.items()}, **own}

    def run(self, words: Sequence[str], before: Sequence[str] = (), code: int = 0) -> list[dict[str, Any]]:
        """The events of `mrrope WORDS`, whose words of capital letters are places."""
        names: Mapping[str, Path] = {
            "MODEL": self.root / "models" / "m.gguf", "OUT": self.root / "out", "TEXT": self.root / "models" / "t.txt",
            "BOOK": self.root / "models" / "book.txt",
        }  # fmt: skip
        given = [re.sub("^(MODEL|OUT|TEXT|BOOK)", lambda m: str(names[m[0]]), word) for word in words]
        log = self.root / "log"
        done = subprocess.run(
            [*before, sys.executable, "-m", "tests.recorder", str(log), *given],
            env=self.env, cwd=self.root / "work", stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, (done.stdout + done.stderr).decode("utf-8", "replace")[-3000:]
        return recorder.events(log)

    def changed(self, events: Sequence[Mapping[str, Any]]) -> set[str]:
        """The folders, as names below the root, or whole where they are elsewhere, in which something was changed."""
        paths = {Path(path) for event in events for path in event.get("paths", ())}
        return {self.folder_of(path) for path in paths - {Path(os.devnull)}}

    def folder_of(self, path: Path) -> str:
        if not path.is_relative_to(self.root):
            return str(path)
        parts = path.relative_to(self.root).parts
        return "/".join(parts[:3]) if parts[0] == "home" else parts[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# verb: where it may change something
VERBS: list[tuple[tuple[str, ...], set[str]]] = [
    (("inspect", "MODEL"), set()),
    (("fit", "MODEL", "-c", "4096"), set()),
    (("doctor",), set()),
    (("texts",), set()),
    (("sessions", "list"), set()),
    (("build", "--list"), set()),
    (("extend", "MODEL", "--scale", "2", "--dry-run"), set()),
    (("extend", "MODEL", "OUT/x.gguf", "--scale", "2"), {"out"}),
    (("extend", "MODEL", "--scale", "2", "--in-place"), {"models"}),
    (("export", "ollama", "MODEL", "--out", "OUT"), {"out"}),
    (("figure", "factors", "MODEL", "--data", "OUT/f.json", "--out", "OUT/f.png"), {"out", *PLOTS}),
    (("inspect", "MODEL", "--plot", "OUT/p.svg"), {"out", *PLOTS}),
    (("chat", "MODEL", "-p", "hello", "-n", "4", "-t", "1", "-f", "BOOK", "--session", "s"), {"data"}),
    (("chat", "MODEL", "-p", "hello", "-n", "4", "-t", "1"), {"data"}),
]


IDS = [f"{' '.join(words[:2])} {i}" for i, (words, _) in enumerate(VERBS)]


@pytest.mark.parametrize(("words", "allowed"), VERBS, ids=IDS)
def test_where_a_verb_writes(place: Place, words: tuple[str, ...], allowed: set[str]) -> None:
    events = place.run(words)
    assert place.changed(events) <= allowed
    if "out" in allowed:
        assert "out" in place.changed(events)  # the recorder sees what there is to see
    assert [event for event in events if event["event"].startswith("socket.")] == []
    assert list((place.root / "work").iterdir()) == []  # nothing where the user happens to be
    assert list((place.root / "tmp").iterdir()) == []


def test_revert(place: Place) -> None:
    place.run(("extend", "MODEL", "OUT/x.gguf", "--scale", "2"))
    assert place.changed(place.run(("revert", "OUT/x.gguf"))) == {"out"}


def test_eval_and_report(place: Place) -> None:
    """Files of a static way are made beside the model, where they can share its blocks, and are gone at the end.

    llama.cpp's log is caught in a temporary file without a name.
    """
    asked = ("eval", "ppl", "MODEL", "--methods", "none,yarn", "--lengths", "512", "--text", "TEXT", "-t", "1")
    events = place.run((*asked, "--scale", "2", "--out", "OUT"))
    assert place.changed(events) <= {"out", "cache", "models", "tmp", *PLOTS}
    assert list((place.root / "tmp").iterdir()) == []
    models = place.root / "models"
    paths = [Path(path) for event in events for path in event.get("paths", ())]
    beside = {path.relative_to(models).parts[0] for path in paths if path.is_relative_to(models)}
    assert all(name.startswith(".mrrope-eval-") for name in beside)
    assert sorted(path.name for path in models.iterdir()) == ["book.txt", "m.gguf", "t.txt"]
    assert place.changed(place.run(("report", "OUT"))) <= {"out", *PLOTS}


def test_what_native_code_writes(place: Place) -> None:
    """strace sees what the recorder cannot: llama.cpp writes a session's state by itself."""
    if shutil.which("strace") is None or sys.platform != "linux":
        pytest.skip("needs strace")
    trace = place.root / "trace"
    probe = subprocess.run(["strace", "-o", str(trace), "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.decode().strip()}")
    calls = "open,openat,openat2,creat,rename,renameat,renameat2,mkdir,mkdirat,link,linkat,symlink,symlinkat,truncate"
    before = ("strace", "-f", "-qq", "-o", str(trace), "-s", "4096", "-e", f"trace={calls}")
    place.run(("chat", "MODEL", "-p", "hello", "-n", "4", "-t", "1", "-f", "BOOK", "--session", "s"), before)
    written = set()
    for line in trace.read_text(errors="replace").splitlines():
        opened = re.search(r"open(?:at2?)?\(", line)
        if opened and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND", line):
            continue
        if re.search(r"= -1 E", line):
            continue
        written |= {Path(path) for path in re.findall(r'"(/[^"]*)"', line)}
    assert {path for path in written if path.suffix == ".tmp"}  # the state, which llama.cpp opened
    folders = {place.folder_of(path) for path in written if not path.is_relative_to("/dev")}
    assert folders <= {"data", "log"}


def test_the_recorder_sees_every_way_to_change_a_file(tmp_path: Path) -> None:
    code = """
import os, shutil, sys, tempfile
from pathlib import Path
from tests import recorder
recorder.start(Path(sys.argv[1]))
at = Path(sys.argv[2])
open(at / "a", "w").close(); open(at / "a").close(); open(at / "a", "r+b").close()
(at / "b").write_text("x"); (at / "b").read_text()
os.close(os.open(at / "c", os.O_CREAT | os.O_WRONLY)); os.close(os.open(at / "c", os.O_RDONLY))
os.replace(at / "c", at / "d"); os.link(at / "d", at / "e"); os.symlink(at / "d", at / "f")
os.mkdir(at / "g"); os.rmdir(at / "g"); os.truncate(at / "d", 0); os.chmod(at / "d", 0o600); os.unlink(at / "e")
shutil.copyfile(at / "a", at / "h"); tempfile.mkdtemp(dir=at)
"""
    log = tmp_path / "log"
    (tmp_path / "x").mkdir()
    subprocess.run([sys.executable, "-c", code, str(log), str(tmp_path / "x")], cwd=ROOT, check=True)
    events = recorder.events(log)
    changed = {Path(path).name for event in events for path in event["paths"]}
    assert {"a", "b", "c", "d", "e", "f", "g", "h"} <= changed
    assert sum(event["event"] == "open" and event["paths"][0].endswith("/a") for event in events) == 2
    kinds = ("rename", "link", "symlink", "mkdir", "rmdir", "truncate", "chmod", "remove")
    assert {f"os.{kind}" for kind in kinds} <= {event["event"] for event in events}


def test_a_model_is_never_written(place: Place) -> None:
    """Where the model and its folder are read-only, all that only reads works."""
    model = tiny.make(place.root / "out" / "readonly.gguf")
    before = model.read_bytes()
    model.chmod(0o444)
    for verb in ("inspect", "fit"):
        place.run((verb, str(model)))
    assert model.read_bytes() == before
