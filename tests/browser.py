"""A headless Chromium driven over its DevTools pipe: no driver program, no package, one page at a time."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# puts the pipes where the browser looks for them, and becomes the browser
_PUT_PIPES = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, place in zip(high, (3, 4)):
    os.dup2(number, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. Commands are JSON ended by a zero byte, on descriptors 3 and 4 of the browser."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer, self._n, self._session = b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def send(self, method: str, **params: Any) -> Any:
        """One command's result; what the browser reports meanwhile is dropped."""
        self._n += 1
        command = {"id": self._n, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (answer := self._message()).get("id") != self._n:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _message(self) -> Any:
        while b"\0" not in self._buffer:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; its value. Until the page is there an exception counts as false."""
        deadline = time.monotonic() + seconds
        safe = f"(() => {{ try {{ return {script} }} catch (error) {{ return false }} }})()"
        while not (value := self.evaluate(safe)):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.2)
        return value

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def type(self, selector: str, text: str) -> None:
        """Type into what a selector finds, and press Enter."""
        self.until(f"document.querySelector({json.dumps(selector)}) !== null")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(width: int = 1000, height: int = 720) -> Iterator[Page]:
    """A browser with a profile of its own, gone afterwards."""
    assert CHROMIUM is not None
    (to_read, write), (read, to_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            sys.executable, "-c", _PUT_PIPES, str(to_read), str(to_write), CHROMIUM, "--headless", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
        ]  # fmt: skip
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=log, stderr=log)
            os.close(to_read)
            os.close(to_write)
            try:
                yield Page(write, read)
            finally:
                with suppress(OSError):
                    os.close(write)  # on which it ends
                os.close(read)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
