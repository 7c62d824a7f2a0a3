"""A suite that is interrupted in every way goes on as if it had not been: the command itself, in its own processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.evals.suite import NAME
from tests import tiny
from tests.eval_suite import Cells, cells, lines, prose
from tests.patched import environment

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.name != "posix", reason="SIGINT and SIGKILL are sent to processes"),
]

LENGTH = 3072
WAYS = "none,truncate,yarn,elastic,yarn@B"


class Command:
    """`mrrope eval` on one model and text, with a cache folder of its own."""

    def __init__(self, folder: Path, lib: Path | None) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.model = tiny.make(folder / "m.gguf", n_layer=3, n_ctx=512)
        self.text = prose(folder / "t.txt", 1200)
        self.env = {**environment(lib), "MRROPE_CACHE": str(self.cache)}

    def start(self, out: Path, *more: str, what: str = "ppl", ways: str = WAYS) -> subprocess.Popen[str]:
        words = ["eval", what, str(self.model), "--methods", ways, "--text", str(self.text), "-fa", "off", "-t", "1"]
        words += ["--lengths", f"1024,{LENGTH}"] * ("--lengths" not in more)
        return subprocess.Popen(
            [sys.executable, "-m", "mrrope_gguf", *words, "--out", str(out), *more],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, out: Path, *more: str, code: int = 0, what: str = "ppl", ways: str = WAYS) -> str:
        """What it said on stderr, after it ended with that code."""
        process = self.start(out, *more, what=what, ways=ways)
        _, said = process.communicate(timeout=300)
        assert process.returncode == code, said
        return said

    def states(self) -> list[str]:
        folder = self.cache / "evals"
        return sorted(each.name for each in folder.iterdir() if each.name != "key") if folder.exists() else []


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, patched: Path) -> Command:
    return Command(tmp_path_factory.mktemp("resume"), patched)


@pytest.fixture(scope="module")
def whole(command: Command) -> Cells:
    """What the command finds in one go."""
    command.run(command.folder / "whole")
    assert command.states() == []
    return results(command.folder / "whole")


def results(out: Path) -> Cells:
    return cells(RunLog(out / NAME).runs())


def n_lines(out: Path) -> int:
    return len(lines(out)) if (out / NAME).exists() else 0


def until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> bool:
    """Wait; False if the process ended first."""
    while not ready():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def ended(process: subprocess.Popen[str], by: int) -> int:
    process.send_signal(by)
    process.communicate(timeout=60)
    return process.returncode


def whole_again(command: Command, out: Path, whole: Cells) -> None:
    """Everything is there, once, and is what one run gives; nothing is left in the cache."""
    found = lines(out)
    assert len(found) == len(set(found))
    assert results(out) == whole
    assert command.states() == []


def test_ctrl_c(command: Command, whole: Cells, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = command.start(out)
    assert until(process, lambda: n_lines(out) >= 9)
    assert ended(process, signal.SIGINT) == 130
    before = lines(out)
    assert 9 <= len(before) < len(whole)
    assert len(command.states()) <= 1  # of the pass that was cut off, none between two passes
    command.run(out)
    assert lines(out)[: len(before)] == before
    whole_again(command, out, whole)


def test_killed_again_and_again(command: Command, whole: Cells, tmp_path: Path) -> None:
    out, rng, kills = tmp_path / "out", random.Random(5), 0
    for _ in range(6):
        enough = n_lines(out) + rng.randrange(1, 7)
        process = command.start(out)
        if not until(process, lambda enough=enough: n_lines(out) >= enough):  # type: ignore[misc]
            break
        time.sleep(rng.random() * 0.02)
        kills += ended(process, signal.SIGKILL) == -signal.SIGKILL
    assert kills >= 2
    command.run(out)
    whole_again(command, out, whole)


def test_a_log_that_was_cut(command: Command, whole: Cells, tmp_path: Path) -> None:
    """In its last line, in a line before it, and with what a disk leaves after a power loss."""
    out = tmp_path / "out"
    out.mkdir()
    kept = [line for line in (command.folder / "whole" / NAME).read_text().split("\n") if line]
    torn = [line[: len(line) // 2] if i == 5 else line for i, line in enumerate(kept)]
    (out / NAME).write_bytes("\n".join(torn).encode()[:-20] + b"\xff\0\0")
    missing = {json.loads(kept[5])["run"], json.loads(kept[-1])["run"]}
    assert set(results(out)) == set(whole) - missing
    had = lines(out)
    command.run(out)
    assert set(lines(out)[len(had) :]) == missing
    whole_again(command, out, whole)


def test_two_at_once(command: Command, whole: Cells, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [command.start(out), command.start(out)]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert results(out) == whole  # a cell that both made counts once
    assert set(lines(out)) == set(whole)
    assert command.states() == []


def test_what_a_killed_process_kept_goes_with_the_pass(command: Command, whole: Cells, tmp_path: Path) -> None:
    """Killed between a pass's last cell and the removal of its state, or while it wrote one."""
    kept: list[str] = []
    while not kept:  # else it was killed between two passes
        out = Path(tempfile.mkdtemp(dir=tmp_path))
        process = command.start(out)
        assert until(process, lambda out=out: len(command.states()) > 0 and n_lines(out) > 3)  # type: ignore[misc]
        ended(process, signal.SIGKILL)
        kept = [name for name in command.states() if name.endswith(".state")]
    (state,) = kept
    (out / NAME).write_bytes((command.folder / "whole" / NAME).read_bytes()[:-30])  # all but the last cell
    aside = command.cache / "evals" / state.replace(".state", ".0123456789abcdef.tmp")
    aside.write_bytes(b"half a state")
    command.run(out)
    whole_again(command, out, whole)


def stopped_within_a_pass(command: Command, whole: Cells, folder: Path) -> tuple[Path, list[str]]:
    """A folder of results whose next cell goes on from a state that was kept, and that state."""
    for _ in range(10):
        out = Path(tempfile.mkdtemp(dir=folder))
        process = command.start(out)
        assert until(process, lambda out=out: len(command.states()) > 0 and n_lines(out) > 3)  # type: ignore[misc]
        assert ended(process, signal.SIGINT) == 130
        kept = [name for name in command.states() if name.endswith(".state")]
        task = lines(out)[-1].rpartition("/")[0]
        if kept and any(key.startswith(f"{task}/") for key in whole.keys() - set(lines(out))):
            return out, kept
        for name in kept:  # it came between a pass's last cell and the end of its state
            (command.cache / "evals" / name).unlink()
    raise AssertionError("it was never stopped within a pass")


def test_a_broken_state_is_made_again(command: Command, whole: Cells, tmp_path: Path) -> None:
    out, kept = stopped_within_a_pass(command, whole, tmp_path)
    for name in kept:
        file = command.cache / "evals" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # llama.cpp itself would not see it
        file.write_bytes(data)
    said = command.run(out)
    assert "changed since it was written" in said
    whole_again(command, out, whole)


def test_what_joins_and_what_is_refused(command: Command, whole: Cells, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "u.txt"
    command.run(out, ways="none,truncate")
    before = lines(out)
    command.run(out)  # more ways
    whole_again(command, out, whole)
    assert lines(out)[: len(before)] == before
    prose(text, 1200, seed=1)
    command.run(out, "--text", str(text), ways="none,truncate")  # a further text
    assert {key.split("/")[1] for key in results(out)} == {"t", "u"}
    assert len(read(out).ppl["u"]["none"]) == len(read(out).ppl["t"]["none"]) == LENGTH // 256
    now = (out / NAME).read_bytes()
    model, words = command.model.read_bytes(), text.read_text()
    for more, reason in (
        (["--scale", "8"], "the scale was 4.0 and is 8.0"),
        (["-fa", "on"], "the setting flash_attn was False and is True"),
        (["-ctk", "f32"], "the setting type_k was not set and is f32"),
    ):
        assert reason in command.run(out, *more, code=1), more
    text.write_text(words + "And more.")
    assert "the text u was" in command.run(out, "--text", str(text), code=1)
    try:
        tiny.make(command.model, n_layer=3, n_ctx=512, seed=1)
        assert "its sha256 was" in command.run(out, code=1)
    finally:
        command.model.write_bytes(model)
    assert (out / NAME).read_bytes() == now


# --- time --------------------------------------------------------------------------------------------------------


def test_an_estimate_runs_nothing(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = command.run(out, "--estimate")
    assert "cells in" in said
    assert "tokens to read: about" in said
    assert not out.exists()
    assert command.states() == []


def test_a_budget_that_is_enough(command: Command, whole: Cells, tmp_path: Path) -> None:
    """Nothing is left out; tests/test_evals_budget.py holds smaller ones to the clock."""
    out = tmp_path / "out"
    command.run(out, "--budget", "10h")
    whole_again(command, out, whole)
