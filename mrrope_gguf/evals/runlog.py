"""Results that outlive an interruption: one JSON line a run, appended when the run is finished.

Several processes may append to one file: a line is written by one call, and a run that two of them made counts once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Finished runs by name. A file that was cut off in the middle of a line keeps every whole line.

    >>> import tempfile
    >>> log = RunLog(Path(tempfile.mkdtemp()) / "runs.jsonl")
    >>> log.add("uni/8192", {"loss": 2.5})
    >>> log.runs()
    {'uni/8192': {'loss': 2.5}}
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def runs(self) -> dict[str, dict[str, Any]]:
        """{name: result}, in the order they were finished; the first result of a name holds."""
        found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                run = _parsed(line)
                if run is not None:
                    found.setdefault(run.pop("run"), run)
        return found

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Append one finished run and see it on disk."""
        line = json.dumps({"run": name, **result}) + "\n"
        with open(self.path, "ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a line that was cut off stays alone
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        run = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return run if isinstance(run, dict) and isinstance(run.get("run"), str) else None
