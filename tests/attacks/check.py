"""Runs every command on an attack and says what is wrong with how it went: [] is what the tests want."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.case import COMMANDS, Accepts, Answer, Attack, Refuses
from tests.attacks.launcher import MIB, Launcher, Ran
from tests.attacks.sound import llama

SECONDS, ROOM = 1.0, 64 * MIB  # what a refusal may take beyond what the command takes for a sound file
_ARGUMENTS = {
    "inspect": ("inspect", "{}"),
    "extend": ("extend", "{}", "out.gguf", "--scale", "2"),
    "extend --in-place": ("extend", "{}", "--in-place", "--scale", "2"),
    "fit": ("fit", "{}"),
    "chat": ("chat", "{}", "-p", "x", "-n", "2", "-t", "1"),
}
_ERROR = re.compile(r"error: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n")


@dataclass(frozen=True)
class Baseline:
    """What a command takes for a sound file: seconds of CPU, peak RSS, the least address space it runs in (bytes)."""

    cpu: float
    peak: int
    address: int


@dataclass
class Seen:
    """The most that any refusal took beyond its command's baseline."""

    runs: int = 0
    cpu: float = 0.0
    peak: int = 0
    worst: dict[str, str] = field(default_factory=dict)


class Checker:
    """Runs attacks in `folder` through a launcher; `seen` sums up what it took."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder, self.seen = launcher, folder, Seen()
        sound = Attack("sound", "sound", {"m.gguf": llama().data}, dict.fromkeys(COMMANDS, Accepts("it is sound")))
        self.baselines = {command: self._baseline(sound, command) for command in COMMANDS}

    def troubles(self, attack: Attack, command: str) -> list[str]:
        """Everything that is not as it should be when `command` meets the attack."""
        answer = attack.answers[command]
        header_only = isinstance(answer, Refuses) and command == "chat" and attack.group != "vocabulary"
        base = self.baselines["fit" if header_only else command]
        limit = base.address + ROOM if not attack.sizes else None  # a file of gigabytes is mapped whole
        ran, changed = self._run(attack, command, limit)
        found = [f"exit code {ran.code}"] * (ran.code != (0 if isinstance(answer, Accepts) else 1))
        found += ["hung"] * ran.hung + changed * (not isinstance(answer, Accepts) or command in ("inspect", "fit"))
        found += _said(ran, answer)
        found += ["libllama has seen it"] * (header_only and "engine: " in ran.err)
        if not isinstance(answer, Accepts):
            found += self._spent(ran, base, f"{attack.name}, {command}")
        return [f"{trouble}: {ran.err[-600:]}" for trouble in found]

    def _spent(self, ran: Ran, base: Baseline, name: str) -> list[str]:
        cpu, peak, seen = ran.cpu - base.cpu, ran.peak - base.peak, self.seen
        seen.runs += 1
        if cpu > seen.cpu:
            seen.cpu, seen.worst["cpu"] = cpu, name
        if peak > seen.peak:
            seen.peak, seen.worst["peak"] = peak, name
        too_long, too_much = f"{cpu:.2f} s beyond the baseline", f"{peak / MIB:.0f} MiB beyond the baseline"
        return [too_long] * (cpu > SECONDS) + [too_much] * (peak > ROOM)

    def _run(self, attack: Attack, command: str, address: int | None) -> tuple[Ran, list[str]]:
        home, work = self.folder / "home", self.folder / "work"
        for place in (home, work):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        given = attack.write(work)
        before = snapshot(self.folder)
        argv = [word.format(given.relative_to(work)) for word in _ARGUMENTS[command]]
        ran = self.launcher.run(argv, work, address=address, env=environment(home))
        after = snapshot(self.folder)
        changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return ran, [f"changed or written: {changed}"] * bool(changed)

    def _baseline(self, sound: Attack, command: str) -> Baseline:
        ran, _ = self._run(sound, command, None)
        assert ran.code == 0, ran.err
        low, high = 1, 1 << 14  # MiB; bisected, so it is what really suffices
        while high - low > max(8, high // 8):
            middle = (low + high) // 2
            fits = self._run(sound, command, middle * MIB)[0].code == 0
            low, high = (low, middle) if fits else (middle, high)
        return Baseline(ran.cpu, ran.peak, high * MIB)


def environment(home: Path) -> dict[str, str]:
    """The stock engine, and every place the program may write to by itself inside `home`."""
    places = {name: str(home / name.lower()) for name in ("HOME", "MRROPE_DATA", "MRROPE_CACHE", "TMPDIR")}
    return {**places, "MRROPE_ENGINE": "stock", "PYTHONDONTWRITEBYTECODE": "1"}


def snapshot(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Every name under `folder`: its inode, size and bytes (of stretched files the first MiB)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = os.lstat(path)
        data = b"" if not path.is_file() else _beginning(path)
        found[path.relative_to(folder)] = (stat.st_ino, stat.st_size if data else 0, data)
    return found


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MIB)


def _said(ran: Ran, answer: Answer) -> list[str]:
    """What is wrong with the words: an error is one, of three lines, without a traceback or a control character."""
    if any(not (c.isprintable() or c in "\n\r") for c in ran.err):
        return ["a control character on the terminal"]
    if isinstance(answer, Accepts):
        return ["it does not say so"] * (answer.words not in ran.out + ran.err)
    at = ran.err.find("error: ")
    if at < 0 or not _ERROR.fullmatch(ran.err[at:]):
        return ["not one error of three lines"]
    return ["it does not name it"] * (answer.words not in ran.err[at:])
