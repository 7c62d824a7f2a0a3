"""Runs a verb and records which paths Python changed: `python -m tests.recorder LOG VERB ARGUMENTS...`.

One JSON line an event, written as it happens. What native code opens is not seen here; tests use strace for that.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# events of the audit hook whose first argument, and second where there is one, are paths that change
_CHANGES = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.mkfifo", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree",
}  # fmt: skip
_FOLDERS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.link": 2, "os.symlink": 2, "os.chmod": 2}


def start(log: Path) -> None:
    """Record from now on, into `log`."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    busy = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        found: dict[str, Any] | None = None
        if event == "open" and not isinstance(args[0], int) and _writes(args[1], args[2]):
            found = {"event": event, "paths": [_whole(args[0])]}
        elif event in _CHANGES:
            n_paths = 2 if event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile") else 1
            folder = _FOLDERS.get(event)  # the descriptor of a folder that a relative path counts from, or -1
            base = args[folder] if folder is not None and isinstance(args[folder], int) else -1
            paths = [_whole(each, base) for each in args[:n_paths] if not isinstance(each, int)]
            found = {"event": event, "paths": paths}
        elif event == "subprocess.Popen":
            found = {"event": event, "command": repr(args[1])}
        elif event in ("socket.connect", "socket.bind"):
            found = {"event": event, "address": repr(args[1])}
        if found:
            busy = True
            os.write(fd, json.dumps(found).encode() + b"\n")
            busy = False

    sys.addaudithook(hook)


def _writes(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & _WRITES)


def _whole(path: Any, folder: int = -1) -> str:
    start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 and os.path.isdir("/proc/self/fd") else os.getcwd()
    return os.path.normpath(os.path.join(start, os.fsdecode(path)))


def events(log: Path) -> list[dict[str, Any]]:
    """What was recorded."""
    return [json.loads(line) for line in log.read_text().splitlines()]


if __name__ == "__main__":
    start(Path(sys.argv[1]))
    from mrrope_gguf.cli import main

    sys.exit(main(sys.argv[2:]))
