"""llama-server for tests: a process on a free port of the loopback device, and requests to it."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving(programs: Path, *arguments: str | Path) -> Iterator[str]:
    """The address of a llama-server with one slot, or as `arguments` say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [programs / "llama-server", "--port", str(port), "-np", "1", "-t", "2", *arguments]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while not healthy(address):
                assert server.poll() is None, f"llama-server ended with {server.returncode}:\n{_tail(log)}"
                assert time.monotonic() < deadline, f"llama-server does not answer:\n{_tail(log)}"
                time.sleep(0.2)
            yield address
            assert server.poll() is None, f"llama-server ended with {server.returncode}:\n{_tail(log)}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def _tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-2000:].decode(errors="replace"))


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, path: str, **body: Any) -> Any:
    """What the server answers: GET without a body, else POST. An HTTPError for what it refuses."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
