"""What an attack is: files, the one that is named on the command line, and what each command must answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = ("inspect", "extend", "extend --in-place", "fit", "chat")
READS = ("extend", "extend --in-place", "fit", "chat")  # all that need a model; `inspect` describes any sound GGUF


@dataclass(frozen=True)
class Refuses:
    """Exit code 1, one error, which names this field and the byte it stands at."""

    offset: int
    field: str

    @property
    def words(self) -> str:
        return f"{self.field} at byte {self.offset}: "

    def __str__(self) -> str:
        return f"refused: {self.field} at byte {self.offset}"


@dataclass(frozen=True)
class Says:
    """Exit code 1, one error with these words; `why` it names no byte."""

    words: str
    why: str

    def __str__(self) -> str:
        return f"refused: “{self.words}” ({self.why})"


@dataclass(frozen=True)
class Accepts:
    """Exit code 0, and `why` that is right; `words` stand in what it prints."""

    why: str
    words: str = ""

    def __str__(self) -> str:
        return f"accepted: {self.why}"


Answer = Refuses | Says | Accepts


@dataclass(frozen=True)
class Attack:
    """files: bytes by name (a folder where the name ends in /); sizes: to what length files are stretched by a hole.

    given: the file named on the command line. note: why ours differs from stock's answer, where it does.
    """

    name: str
    group: str
    files: Mapping[str, bytes]
    answers: Mapping[str, Answer]
    given: str = "m.gguf"
    origin: str = ""
    note: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Put the files into `folder`; returns the one to name."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if name in self.sizes:
                os.truncate(path, self.sizes[name])
        return folder / self.given

    @property
    def refuses(self) -> bool:
        """Whether any command refuses it."""
        return any(not isinstance(answer, Accepts) for answer in self.answers.values())


def everywhere(answer: Answer) -> dict[str, Answer]:
    return dict.fromkeys(COMMANDS, answer)
