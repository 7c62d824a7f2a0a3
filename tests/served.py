"""`mrrope serve` for tests: the whole command in a process of its own, and requests as its clients make them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Served:
    """A `mrrope serve` that runs: its process, its address, and what it said on stderr so far."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        assert process.stdout is not None
        self.base = process.stdout.readline().strip()  # the only line on stdout, once it is ready

    @property
    def address(self) -> str:
        return self.base.removesuffix("/v1")

    @property
    def said(self) -> str:
        return self._log.read_text()

    def client(self, key: str = "none") -> Any:
        openai: Any = pytest.importorskip("openai")
        return openai.OpenAI(base_url=self.base, api_key=key, max_retries=0)

    def stream(self, messages: Any, n: int, key: str = "none") -> Any:
        options = {"temperature": 0, "max_tokens": n, "stream": True}
        return self.client(key).chat.completions.create(model="any", messages=messages, **options)

    def ends(self, seconds: float = 20) -> int:
        return self.process.wait(timeout=seconds)


def listening(parent: int) -> set[str]:
    """The addresses that a process and its children listen on, as the kernel has them. Linux."""
    own = [parent, *_children(parent)]
    sockets = {os.readlink(fd) for pid in own for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:  # TCP_LISTEN, inode
                words = bytes.fromhex(local.partition(":")[0])
                data = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))  # words of 4 bytes, low first
                found.add(socket.inet_ntop(family, data))
    return found


def _children(parent: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [*own, *(below for child in own for below in _children(child))]


def text_of(stream: Any) -> list[str]:
    return [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mrrope_gguf", "serve", *map(str, arguments)]


def environment(programs: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return {**kept, "MRROPE_ENGINE": str(programs), **more}


@contextmanager
def serving(programs: Path, *arguments: str | Path, **env: str) -> Iterator[Served]:
    """`mrrope serve` on a free port, one thread unless told; ended afterwards if the test did not."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        words = command("--port", "0", "-t", "1", *arguments)
        with log.open("w") as err:
            process = subprocess.Popen(
                words, env=environment(programs, **env), stdout=subprocess.PIPE, stderr=err, text=True
            )
        with process:
            try:
                served = Served(process, log)
                assert served.base, served.said
                yield served
            finally:
                process.terminate()
                process.wait(timeout=20)
