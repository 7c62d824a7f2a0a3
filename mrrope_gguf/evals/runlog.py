"""Results that outlive an interruption: one JSON line a run, appended when the run is finished.

Several processes may append to one file: a line is written by one call, and a run that two of them made counts once.
Each line ends in a check, the beginning of its own sha256, so that one that was changed by hand or by a bad disk is not
taken for a measurement. It is no signature: who can write the file can write a check that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..gguf.stage import file_errors
from ..text import printable

_CHECK = re.compile(r', "check": "([0-9a-f]{16})"\}\s*$')


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
        """{name: result}, in the order they were finished; the first result of a name holds. Raises as `parse` does."""
        found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            with file_errors(self.path, "read"):
                data = self.path.read_bytes()
            for run in parse(data, self.path)[0]:
                found.setdefault(run.pop("run"), run)
        return found

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Append one finished run and see it on disk. Raises FileTrouble: the runs before it stay."""
        line = sealed({"run": name, **result}) + "\n"
        with file_errors(self.path), open(self.path, "ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a line that was cut off stays alone
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every run of a log's bytes, {"run": name, **result}, in order; and how many lines are none, such as one cut off.

    Raises BadFile for a line that is whole and not what was written: its check does not fit, or it has none though the
    log's first has one. A log that was begun before there were checks may hold lines without.
    """
    found, others, checks = list[dict[str, Any]](), 0, False
    for number, raw in enumerate(data.split(b"\n"), 1):
        line = raw.decode("utf-8", "replace")
        if not line.strip("\0 \r\t"):
            continue
        try:
            run = json.loads(line)
        except (ValueError, RecursionError):
            run = None
        if not (isinstance(run, dict) and isinstance(run.get("run"), str)):
            others += 1
            continue
        has_check = "check" in run
        checks = has_check if not found else checks
        if (checks and not has_check) or (has_check and not _fits(line)):
            raise BadFile(
                f"{path}: line {number} is not what was written",
                why=f"{printable(run['run'], limit=80)}: "
                + ("its check does not fit it" if has_check else "its check is gone, and the first line has one"),
                fix=f"delete line {number}, and `mrrope eval` measures it again; or give another folder",
                field=printable(run["run"], limit=80),
            )
        run.pop("check", None)
        found.append(run)
    return found, others


def sealed(run: dict[str, Any]) -> str:
    """A run as its line, with its check.

    >>> sealed({"run": "a"})
    '{"run": "a", "check": "721e97d85227ed8c"}'
    """
    text = json.dumps(run)
    return f'{text[:-1]}, "check": "{_check(text)}"}}'


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fits(line: str) -> bool:
    match = _CHECK.search(line)
    return match is not None and match[1] == _check(line[: match.start()] + "}")
