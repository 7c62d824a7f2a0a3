"""Ends an in-place change at every one of its steps in turn, and tells what was left and what recovery made of it.

`python -m tests.kill_steps FILE extend|again|revert|recover` prints one JSON object a step. A child does the work and
kills itself (SIGKILL, so nothing is cleaned up) before the n-th call that changes a file, in the middle of it where it
is a write, for n = 1, 2, ... until a child gets to the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrrope_gguf import revert
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.gguf import journal
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.inplace import recover
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.write import write_in_place
from tests import edits


class Fuse:
    """Counts calls that change files, and ends the process at the n-th."""

    def __init__(self, n: int) -> None:
        self.left = n

    def wrap(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extend(path: Path, n_ctx: int = 256) -> None:
    with Source.open(path) as source:
        write_in_place(edits.extended(Edit(source), n_ctx=n_ctx, permute=n_ctx == 256))


def child(n: int, job: Callable[[], None]) -> bool:
    """Run the job in a process that ends at step n; True if it came to its end."""
    pid = os.fork()
    if pid == 0:
        fuse = Fuse(n)
        for owner, name in (
            (os, "pwrite"),
            (os, "copy_file_range"),
            (os, "fsync"),
            (os, "replace"),
            (os, "unlink"),
            (journal, "shift_range"),
        ):
            fuse.wrap(owner, name)
        job()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def opened(path: Path) -> str:
    """What a user meets who goes on with the file."""
    try:
        with Source.open(path):
            return "opens"
    except FileTrouble as error:
        return f"pending: {error.fix}"


def step(path: Path, start: Path, n: int, job: Callable[[], None], fuse_before: int = 0) -> dict[str, Any]:
    """One child killed at step n, then recovery. fuse_before: first extend, and kill that at this step."""
    for leftover in path.parent.glob(f"{path.name}*"):
        leftover.unlink()
    shutil.copyfile(start, path)
    if fuse_before:
        child(fuse_before, lambda: extend(path))
    finished = child(n, job)
    told = {"n": n, "finished": finished, "sha256": sha256(path), "opened": opened(path)}
    told["recovered"] = recover(path)
    told["after"] = sha256(path)
    told["left"] = sorted(p.name for p in path.parent.glob(f"{path.name}*"))
    return told


def main() -> None:
    path, what = Path(sys.argv[1]), sys.argv[2]
    start = path.with_name("start.gguf")
    shutil.copyfile(path, start)
    if what in ("again", "revert"):
        extend(start)
    jobs: dict[str, Callable[[], Any]] = {
        "extend": lambda: extend(path),
        "again": lambda: extend(path, 512),
        "revert": lambda: revert(path),
        "recover": lambda: recover(path),
    }
    fuse_before = 0
    if what == "recover":  # an extension cut short after it moved the data, then recovery cut short likewise
        fuse_before = next(n for n in range(1, 99) if step(path, start, n, jobs["extend"])["recovered"]) + 3
    print(json.dumps({"before": sha256(start)}))
    for n in range(1, 99):
        told = step(path, start, n, jobs[what], fuse_before)
        print(json.dumps(told))
        if told["finished"]:
            return


if __name__ == "__main__":
    main()
