"""Hostile files: each is given to every command, which must answer as docs/attacks.md says and take next to nothing.

The commands run in processes forked from one that has imported the program, two at a time; MRROPE_TEST_HARD=1 starts
the real program for each as well.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import bad_gguf
from tests.attacks.case import COMMANDS, Accepts, Attack
from tests.attacks.cases import CASES, GROUPS
from tests.attacks.check import ROOM, SECONDS, Checker
from tests.attacks.launcher import MIB, Kind, Launcher

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and fork as Linux has them"),
]
Job = tuple[Attack, str]
WORKERS = 2


def sweep(kind: Kind, jobs: list[Job], folder: Path) -> list[str]:
    """All troubles, from WORKERS launchers side by side."""

    def work(i: int) -> list[str]:
        place = folder / str(i)
        with Launcher(kind, place / "launcher") as launcher:
            checker = Checker(launcher, place / "files")
            found = [
                f"{attack.name}, {command}: {trouble}"
                for attack, command in jobs[i::WORKERS]
                for trouble in checker.troubles(attack, command)
            ]
            print(checker.baselines, checker.seen)
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        return [trouble for part in pool.map(work, range(WORKERS)) for trouble in part]


def few(attack: Attack, i: int) -> tuple[str, ...]:
    """For CI, where a header is malformed: inspect and one of the others by turns; else all."""
    return ("inspect", COMMANDS[1 + i % 4]) if attack.group == "header" else COMMANDS


def test_every_command_answers_every_attack(tmp_path: Path) -> None:
    jobs = [(attack, command) for i, attack in enumerate(CASES.values()) for command in few(attack, i)]
    assert sweep("cli", jobs, tmp_path) == []


@pytest.mark.hard
def test_every_program_answers_every_attack(tmp_path: Path) -> None:
    """The same with `python -m mrrope_gguf` started for each: about 2000 processes."""
    jobs = [(attack, command) for attack in CASES.values() for command in COMMANDS]
    assert sweep("program", jobs, tmp_path) == []


def test_what_is_accepted_is_written_down() -> None:
    assert len(CASES) >= 80
    assert {attack.group for attack in CASES.values()} == set(GROUPS)
    assert bad_gguf.CASES.keys() <= CASES.keys()
    for name, attack in CASES.items():
        assert attack.answers.keys() == set(COMMANDS), name
        assert attack.given in attack.files, name
        accepted = [answer for answer in attack.answers.values() if isinstance(answer, Accepts)]
        assert all(answer.why for answer in accepted), name
        if attack.group in ("header", "long"):
            assert not accepted, name
    files = [tuple(sorted(a.files.items())) + tuple(a.sizes.items()) + (a.given,) for a in CASES.values()]
    assert len(set(files)) > len(files) - 5, "distinct, but for a handful of names of one file"


def test_the_limits_are_real(tmp_path: Path) -> None:
    """A launcher sees a process that takes too much memory or time, or dies."""
    with Launcher("probe", tmp_path) as launcher:
        least = next(n for n in range(8, 4096, 8) if launcher.run(["1"], tmp_path, address=n * MIB).code == 0) * MIB
        assert launcher.run(["32"], tmp_path, address=least + ROOM).code == 0
        assert launcher.run(["80"], tmp_path, address=least + ROOM).code != 0
        one, many = launcher.run(["1"], tmp_path), launcher.run(["80"], tmp_path)
        assert many.peak - one.peak > ROOM
        spun = launcher.run(["spin"], tmp_path, seconds=2)
        assert spun.hung
        assert spun.cpu > SECONDS
        assert launcher.run(["crash"], tmp_path).code == -11


def test_a_checker_finds_what_is_wrong(tmp_path: Path) -> None:
    """Answers that are not the true ones are told apart, and so is a file that was written."""
    with Launcher("cli", tmp_path / "launcher") as launcher:
        checker = Checker(launcher, tmp_path / "files")
        bad, sound = CASES["n_kv-2^40"], CASES["split-prefix-dots"]
        assert checker.troubles(bad, "fit") == []
        other = Attack("other", "header", bad.files, CASES["key-empty"].answers)
        assert "it does not name it" in "".join(checker.troubles(other, "fit"))
        accepted = Attack("accepted", "header", bad.files, dict.fromkeys(COMMANDS, Accepts("no")))
        assert "exit code 1" in "".join(checker.troubles(accepted, "fit"))
        refused = Attack("refused", "split", sound.files, bad.answers, given=sound.given)
        found = "".join(checker.troubles(refused, "extend --in-place"))
        assert "exit code 0" in found
        assert "changed or written: ['work/..-00001-of-00003.gguf']" in found


def test_files_are_written_by_name(tmp_path: Path) -> None:
    attack = CASES["long-string-1GiB"]
    assert os.path.getsize(attack.write(tmp_path)) == 3 << 30
    assert (CASES["split-shard-2-folder"].write(tmp_path).parent / "m-00002-of-00003.gguf").is_dir()
