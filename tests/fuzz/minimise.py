"""The inputs of a Python target that add a step to what is reached: `python -m tests.fuzz.minimise TARGET DIR...`.

The first DIR keeps those; the others are read. Small files are tried first, and one stays if it takes the interpreter
from a line to another that no file before it did. (The C++ targets have libFuzzer's own -merge=1 for this.)
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.python_targets import TARGETS, Target

Steps = set[tuple[str, int, int]]


def steps(target: Target, data: bytes) -> Steps:
    """Every step from line to line that the target takes within the package."""
    found: Steps = set()
    last: dict[int, int] = {}  # by number: a frame that is kept would keep its files open

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            found.add((frame.f_code.co_filename, last.get(id(frame), 0), frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        return line

    def call(frame: FrameType, _event: str, _: Any) -> Any:
        return line if "mrrope_gguf" in frame.f_code.co_filename else None

    sys.settrace(call)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return found


def main() -> None:
    target, kept, *others = sys.argv[1:]
    files = {path: path.read_bytes() for folder in (kept, *others) for path in Path(folder).iterdir()}
    seen: Steps = set()
    for path, data in sorted(files.items(), key=lambda one: len(one[1])):
        new = steps(TARGETS[target], data) - seen
        seen |= new
        if not new and path.parent == Path(kept):
            path.unlink()
        elif new and path.parent != Path(kept):
            (Path(kept) / path.name).write_bytes(data)
    print(f"{target}: {len(list(Path(kept).iterdir()))} of {len(files)} files, {len(seen)} steps")


if __name__ == "__main__":
    main()
