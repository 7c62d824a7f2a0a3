"""A stranger's file cannot command the terminal: names, metadata, texts and logs, through every verb that shows them.

Each verb runs in this process with stdout and stderr that say they are terminals.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import verbs_eval
from mrrope_gguf.cli import main
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.progress import Bar
from tests import tiny

pytestmark = pytest.mark.skipif(os.name != "posix", reason="such file names are POSIX's")

# clears the screen, sets the title, reverses what follows, hides it, rings, and goes back over the line
EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\u200b\x9b31m\rx"
BAR = re.compile("\r([^\r\n]*)\x1b\\[K")  # how a progress bar is drawn


class Screen(io.StringIO):
    """Keeps what is written, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Terminal:
    """Runs verbs; `out` and `err` are what their last run wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self.out, self.err = monkeypatch, "", ""

    def run(self, *words: str | Path) -> int:
        out, err = Screen(), Screen()
        with self._patch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                code = main([str(word) for word in words])
            except SystemExit as ended:
                code = int(ended.code or 0)
        self.out, self.err = out.getvalue(), err.getvalue()
        return code


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MRROPE_DATA", str(tmp_path / "data"))
    return Terminal(monkeypatch)


def commands(text: str) -> list[str]:
    """The characters that a terminal would obey, or that hide or reorder others; a bar's own are let through."""
    text = BAR.sub(r"\1", text)
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]


def said(terminal: Terminal) -> str:
    text = terminal.out + terminal.err
    assert commands(text) == [], text
    return text


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model whose every string and whose own name are commands."""
    folder = tmp_path_factory.mktemp("evil") / f"d{EVIL}"
    folder.mkdir()
    strings = ("name", "description", "author", "license", "finetune", "basename", "size_label", "organization", "url")
    extra: dict[str, Any] = {f"general.{key}": f"{key}{EVIL}" for key in strings}
    extra[f"general.x{EVIL}"] = EVIL
    extra["tokenizer.chat_template"] = f"{EVIL}{tiny.CHAT_TEMPLATE}{{{{ raise_exception('{EVIL}') }}}}"
    made = tiny.make(folder / "m.gguf", extra=extra)
    return made.rename(folder / f"m{EVIL}.gguf")


def test_the_recorder_sees_commands() -> None:
    assert len(commands(EVIL)) == 7
    assert commands("\r50 %\x1b[K\n") == []


VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "MODEL"),
    "inspect-json": ("inspect", "MODEL", "--json"),
    "fit": ("fit", "MODEL", "-c", "512"),
    "fit-json": ("fit", "MODEL", "-c", "512", "--json"),
    "extend-dry": ("extend", "MODEL", "--scale", "2", "--dry-run"),
    "extend": ("extend", "MODEL", "--scale", "2", "--force", "DST"),
    "doctor": ("doctor",),
    "export-modelfile": ("export", "ollama", "MODEL", "--out", "FOLDER"),
    "figure": ("figure", "factors", "MODEL"),
    "figure-data": ("figure", "factors", "MODEL", "--data", "FOLDER.json"),
    "sessions": ("sessions", "list"),
}


def words_of(verb: tuple[str, ...], evil: Path, tmp_path: Path) -> list[str]:
    places = {"MODEL": evil, "DST": tmp_path / f"dst{EVIL}.gguf", "FOLDER": tmp_path / f"out{EVIL}"}
    return [str(places[word]) if word in places else word.replace("FOLDER", str(places["FOLDER"])) for word in verb]


@pytest.mark.parametrize("name", VERBS)
def test_what_a_verb_shows(terminal: Terminal, evil: Path, tmp_path: Path, name: str) -> None:
    code = terminal.run(*words_of(VERBS[name], evil, tmp_path))
    text = said(terminal)
    assert code in (0, 1)
    assert text
    if name in ("inspect", "extend", "export-modelfile"):
        assert "\\e[2J" in text  # it was shown, written out


def test_revert(terminal: Terminal, evil: Path, tmp_path: Path) -> None:
    dst = tmp_path / f"dst{EVIL}.gguf"
    assert terminal.run("extend", evil, dst, "--scale", "2") == 0
    assert terminal.run("revert", dst, tmp_path / f"back{EVIL}.gguf") == 0
    assert "back\\e[2J" in said(terminal)


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", f"/no/such{EVIL}"),
        ("extend", f"/no/such{EVIL}", "--scale", "2"),
        ("fit", f"/no/such{EVIL}"),
        ("chat", f"/no/such{EVIL}"),
        ("eval", "ppl", f"/no/such{EVIL}", "--out", f"/no/out{EVIL}"),
        ("report", f"/no/such{EVIL}"),
        ("texts", EVIL),
        ("sessions", "show", EVIL),
        ("sessions", "rm", EVIL),
        ("build", "--remove", EVIL),
        ("build", "--pin", EVIL),
        ("build", "--backend", "cpu", "--source", f"/no/such{EVIL}"),
        ("export", "ollama", f"/no/such{EVIL}"),
        ("inspect", "a", f"b{EVIL}"),
        (f"verb{EVIL}",),
        ("fit", "m.gguf", "-c", f"1{EVIL}"),
        ("figure", "factors", f"/no/such{EVIL}"),
    ],
    ids=lambda words: " ".join(words[:2]).split("\x1b")[0],
)
def test_errors(terminal: Terminal, words: tuple[str, ...]) -> None:
    assert terminal.run(*words) in (1, 2)
    said(terminal)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x1b[2J", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_what_is_no_model(terminal: Terminal, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"m{EVIL}.gguf"
    path.write_bytes(content)
    for verb in (["inspect"], ["fit"], ["extend", "--scale", "2"]):
        assert terminal.run(*verb, path) == 1
        assert "\\e[2J" in said(terminal)


def test_a_report_of_hostile_results(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / f"out{EVIL}"
    out.mkdir()
    log = RunLog(out / "results.jsonl")
    log.add("#head", {"version": 1, "model": {"name": EVIL, "n_ctx_orig": 64}, "ways": {EVIL: {"kind": EVIL}}})
    for i in range(4):
        cell = {"task": f"t{EVIL}", "way": f"w{EVIL}", "length": 64, "score": 0.5, "said": EVIL, "expected": [EVIL]}
        log.add(f"t/{i}{EVIL}", cell)
    assert terminal.run("report", out) == 0
    said(terminal)
    for name in ("report.html", "report.md"):
        assert commands((out / name).read_text()) == [], name
    log.path.write_text(log.path.read_text().replace("0.5", "0.9"))
    assert terminal.run("report", out) == 1
    assert "line 2 is not what was written" in said(terminal)


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    for bar in (Bar(EVIL, ("MB", 1e6)), verbs_eval._EvalBar()):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        bar.shown = True
        if isinstance(bar, verbs_eval._EvalBar):
            bar.time(EVIL, 1, 2)
        bar(1, 2)
        assert "\\e[2J" in screen.getvalue()
        assert commands(screen.getvalue()) == []


def test_a_pass_is_named_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    verbs_eval._EvalBar().time(EVIL, 1, 2)
    assert "\\e[2J" in (err := capsys.readouterr().err)
    assert commands(err) == []


def test_a_program_gets_the_very_name(evil: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """stdout that is no terminal is data: what a script reads opens the file."""
    dst = tmp_path / f"dst{EVIL}.gguf"
    shutil.copy(evil, tmp_path / "m.gguf")
    assert main(["extend", str(tmp_path / "m.gguf"), str(dst), "--scale", "2"]) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{dst}\n"
    assert commands(captured.err) == []
