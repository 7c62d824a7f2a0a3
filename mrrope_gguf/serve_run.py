"""Runs llama-server: its log passed on, signals handed down, ready when /health says so, its exit code ours."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .errors import EngineTrouble
from .serve import Plan
from .serve_net import healthy
from .text import printable

Say = Callable[[str], object]

_TAIL = 40  # lines of the log that are kept for an error
_EVERY = 0.1  # seconds between questions to /health
_GRACE = 3.0  # seconds to end in; while a client waits for an answer llama-server never does
_KILL = 9
_WHY = ("error", "failed", "couldn't", "cannot", "unable", "invalid", "unknown")


def run(plan: Plan, say: Say, ready: Callable[[float], object]) -> int:
    """Start the server and stay until it ends; returns its exit code, 128 + N where signal N ended it.

    say(line): the server's log, made safe to print. ready(seconds): called once, when the model is loaded. SIGINT,
    SIGTERM and SIGHUP are handed down, on which the server ends by itself or, with answers under way, is ended (0);
    the second one ends it at once.
    Raises EngineTrouble with the reason from its log where it ends before it is ready and nobody asked it to.
    """
    start = time.monotonic()
    process = _start(plan)
    with process, _handed_down(process) as asked:
        log = _Log(process, say)
        if _is_ready(plan.url, process):
            ready(time.monotonic() - start)
        elif not asked:
            raise log.trouble(process.wait())
        code = process.wait()
        log.join()
    if code == -_KILL and len(asked) == 1:
        say("stopped, with answers under way")
        return 0
    if code < 0 and not asked:
        say(_killed(-code))
    return code if code >= 0 else 128 - code


def _start(plan: Plan) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            plan.command, env=dict(plan.env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            preexec_fn=_end_with_us if sys.platform == "linux" else None,
            start_new_session=True,  # a terminal's Ctrl-C comes through us, once
        )  # fmt: skip
    except OSError as error:
        raise EngineTrouble(
            f"{plan.command[0]}: does not start", why=str(error), fix="`mrrope build --list` shows what is there"
        ) from error


def _end_with_us() -> None:
    """Ask Linux to stop the server when this process is killed; else it would go on, unseen, with all its memory."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def _handed_down(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Hand signals down while the server runs; the list holds those that came."""
    asked: list[int] = []
    last = threading.Timer(_GRACE, process.kill)
    last.daemon = True

    def hand_down(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            process.kill()
            return
        last.start()
        if sys.platform == "win32":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, hand_down)
        for number in (getattr(signal, name) for name in names if main and hasattr(signal, name))
    }
    try:
        yield asked
    except BaseException:
        process.kill()
        raise
    finally:
        last.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ready(url: str, process: subprocess.Popen[str]) -> bool:
    """Wait until the server answers; False once it has ended. Loading takes as long as the disk does."""
    while process.poll() is None:
        if healthy(url):
            return True
        time.sleep(_EVERY)
    return False


class _Log:
    """The server's log: each line passed on as it comes, the last ones kept."""

    def __init__(self, process: subprocess.Popen[str], say: Say) -> None:
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._thread = threading.Thread(target=self._pass_on, args=(process, say), daemon=True)
        self._thread.start()

    def _pass_on(self, process: subprocess.Popen[str], say: Say) -> None:
        for line in process.stdout or ():
            shown = printable(line.rstrip(), limit=1000)
            self._tail.append(shown)
            with suppress(OSError, ValueError):  # a terminal that is gone must not stop the server's writing
                say(shown)

    def join(self) -> None:
        self._thread.join(timeout=5)

    def trouble(self, code: int) -> EngineTrouble:
        """Why the server ended before it was ready."""
        self.join()
        lines = [line for line in self._tail if line.strip()]
        said = [line for line in lines if any(word in line.lower() for word in _WHY)] or lines[-1:]
        status = _killed(-code) if code < 0 else f"it ended with status {code}"
        return EngineTrouble(
            "llama-server did not start",
            why=": ".join([status, *said[:1]]),
            fix="-v shows its whole log; `mrrope inspect` checks the file",
        )


def _killed(number: int) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    hint = ", most likely for want of memory: a smaller -c, or -ctk q8_0 -ctv q8_0" if name == "SIGKILL" else ""
    return f"llama-server was ended by {name}{hint}"
