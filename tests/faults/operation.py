"""What an operation is that meets faults, and the parts that several of them share."""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.injector import MODES, Mode

DONE, REFUSED, KILLED, RAISED, HUNG = "was done", "was refused", "was killed", "raised", "hung"
BUS = "met SIGBUS"  # it read a mapped file that was cut short: the system ends it


@dataclass(frozen=True)
class Met:
    """What came of one run: how it ended, and what it said, or the way it took where it says that."""

    how: str
    said: str = ""


class Operation(ABC):
    """Something that writes files below `place`. `look` and `recovered` give what is wrong, in words."""

    modes: Mapping[str, Mode] = MODES
    victim: Path | None = None  # what goes, in the modes of VANISHING
    way = ""  # how `act` did it, where there are several ways

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def prepare(self) -> None:
        """Make `place` what it is before the operation."""

    @abstractmethod
    def act(self) -> None:
        """Do it, in a child of its own."""

    def again(self) -> None:
        """What a user does next, in a child of its own and without a fault."""
        self.act()

    @abstractmethod
    def finished(self) -> None:
        """Remember what it leaves where nothing goes wrong."""

    @abstractmethod
    def look(self, met: Met, mode: Mode) -> list[str]:
        """What was lost by a run that met a fault."""

    @abstractmethod
    def recovered(self) -> list[str]:
        """What the next run did not put right."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give up what was held between the points."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by name, and its sha256."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lost+found"
    }


def fill(folder: Path, kept: dict[str, bytes]) -> None:
    """Make a folder hold these files, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    for name, data in kept.items():
        path = folder / name
        if not path.exists() or path.stat().st_nlink > 1 or path.read_bytes() != data:
            path.unlink(missing_ok=True)
            path.write_bytes(data)
