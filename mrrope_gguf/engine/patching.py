"""Applies a patch to a tree, and says which hunk of which file does not fit. Needs neither git nor patch(1).

A hunk must be found exactly, at its line or moved; nothing is guessed, and nothing is written unless all of it fits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mrrope_gguf.errors import EngineTrouble

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@ ?(.*)")


@dataclass
class Hunk:
    """One @@ part: the lines it expects (context and removed) and those it leaves (context and added)."""

    number: int
    start: int  # 0-based line of the old file
    title: str
    old: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)

    def __str__(self) -> str:
        return f"hunk {self.number} (line {self.start + 1}{', ' + self.title if self.title else ''})"


@dataclass
class FilePatch:
    """The hunks for one file of the tree; `creates` where the file is new."""

    path: str
    creates: bool
    hunks: list[Hunk] = field(default_factory=list)


@dataclass(frozen=True)
class Misfit:
    """A hunk that does not fit, or a whole file (hunk None), and why."""

    path: str
    hunk: Hunk | None
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.hunk} {self.why}" if self.hunk else f"{self.path} {self.why}"


def parse_patch(patch: bytes) -> list[FilePatch]:
    """The files of a git diff. ValueError for what a source patch never holds: binaries, renames, removed files."""
    files: list[FilePatch] = []
    lines = patch.splitlines(keepends=True)
    at, creates = 0, False
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith((b"rename ", b"copy ", b"deleted file", b"GIT binary", b"Binary files")):
            raise ValueError(f"line {at}: a patch that changes more than text: {line[:60]!r}")
        if line.startswith(b"--- "):
            creates = line.split()[1] == b"/dev/null"
        elif line.startswith(b"+++ "):
            files.append(FilePatch(_name(line), creates))
        elif line.startswith(b"@@ ") and files:
            at = _read_hunk(lines, at, files[-1])
    return files


def _name(line: bytes) -> str:
    name = line[4:].strip().decode("utf-8")
    path = PurePosixPath(name.partition("/")[2])
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"a patch for {name!r}, outside the tree")
    return str(path)


def _read_hunk(lines: Sequence[bytes], at: int, file: FilePatch) -> int:
    match = _HUNK.match(lines[at - 1])
    if not match:
        raise ValueError(f"line {at}: a hunk without line numbers")
    start, n_old, _, n_new = (1 if group is None else int(group) for group in match.groups()[:4])
    title = match[5].decode("utf-8", "replace").strip()
    hunk = Hunk(len(file.hunks) + 1, max(start - 1, 0), title)
    while len(hunk.old) < n_old or len(hunk.new) < n_new:
        if at == len(lines):
            raise ValueError(f"{file.path}: {hunk} ends before its last line")
        kind, text = lines[at][:1], lines[at][1:]
        at += 1
        if kind not in b" -+\n":
            raise ValueError(f"{file.path}: {hunk} holds a line that is neither kept, removed nor added")
        if kind == b"\n":  # an empty context line that lost its space
            kind, text = b" ", b"\n"
        if kind != b"+":
            hunk.old.append(text)
        if kind != b"-":
            hunk.new.append(text)
    if at < len(lines) and lines[at].startswith(b"\\"):
        for side in (hunk.old, hunk.new):
            if side:
                side[-1] = side[-1].rstrip(b"\n")
        at += 1
    file.hunks.append(hunk)
    return at


def fit(tree: Path, patch: bytes) -> tuple[dict[Path, bytes], list[Misfit]]:
    """What each file of the tree becomes, and what does not fit. Nothing is written."""
    changed: dict[Path, bytes] = {}
    misfits: list[Misfit] = []
    for file in parse_patch(patch):
        path = tree / file.path
        if file.creates != (not path.exists()):
            misfits.append(Misfit(file.path, None, "exists already" if file.creates else "is not in this tree"))
            continue
        raw = b"" if file.creates else path.read_bytes()
        crlf = b"\r\n" in raw
        lines = raw.replace(b"\r\n", b"\n").splitlines(keepends=True)
        text = b"".join(_patched(lines, file, misfits))
        changed[path] = text.replace(b"\n", b"\r\n") if crlf else text
    return changed, misfits


def _patched(lines: list[bytes], file: FilePatch, misfits: list[Misfit]) -> list[bytes]:
    out: list[bytes] = []
    done = moved = 0
    for hunk in file.hunks:
        at = _place(lines, hunk, hunk.start + moved, done)
        if at is None:
            why = "is applied already" if _place(lines, Hunk(0, 0, "", hunk.new), hunk.start, 0) is not None else ""
            misfits.append(Misfit(file.path, hunk, why or "does not fit: its lines are not there as the patch expects"))
            continue
        moved = at - hunk.start
        out += lines[done:at] + hunk.new
        done = at + len(hunk.old)
    return out + lines[done:]


def _place(lines: list[bytes], hunk: Hunk, expected: int, first: int) -> int | None:
    """The line at which the hunk's old lines stand, nearest to where they are expected, not before `first`."""
    size = len(hunk.old)
    last = len(lines) - size
    for distance in range(max(last - expected, expected - first, 0) + 1):
        for at in (expected + distance, expected - distance):
            if first <= at <= last and lines[at : at + size] == hunk.old:
                return at
    return None


def apply_patch(tree: Path, patch: Path, name: str) -> None:
    """Change the tree as the patch says, all of it or nothing.

    Raises EngineTrouble naming the first hunks that do not fit; `name` is what the user calls the tree.
    """
    changed, misfits = fit(tree, patch.read_bytes())
    if misfits:
        raise does_not_fit(name, patch, misfits)
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def does_not_fit(name: str, patch: Path, misfits: Sequence[Misfit]) -> EngineTrouble:
    """The error that names the first few hunks and how many more there are."""
    shown = "; ".join(str(misfit) for misfit in misfits[:5])
    more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
    if all(misfit.why == "is applied already" or misfit.why == "exists already" for misfit in misfits):
        fix = "name an unpatched tree: mrrope patches a copy by itself"
    else:
        fix = "name a checkout of one of the commits in patches/UPSTREAM, or leave --source out"
    return EngineTrouble(f"{name}: {patch.name} does not apply", why=shown + more, fix=fix)
