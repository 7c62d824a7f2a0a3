"""One process for each command line, under limits: what it said, how it ended, the CPU and memory it took.

A Launcher is a small process that forks for every job, so that the peak it reports is the job's own and never that of
pytest. Kinds: "program" starts the real program, `python -m mrrope_gguf`; "cli" has imported the program already and
calls its main(); "stock" hands the file to stock llama.cpp (see stock.py); "probe" misbehaves, to try the limits. Run
as a script it is that process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MIB = 1 << 20
Kind = Literal["program", "cli", "stock", "probe"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """code: the exit code, or minus the signal. hung: killed for the time it took. cpu: s; peak: bytes of RSS."""

    code: int
    hung: bool
    cpu: float
    peak: int
    out: str
    err: str


class Launcher:
    """`run` one job after another; a context manager."""

    def __init__(self, kind: Kind, scratch: Path, env: Mapping[str, str] | None = None) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        small = ["-S"] if kind == "program" else []  # its RSS is in its children's until they exec
        self._process = subprocess.Popen(
            [sys.executable, *small, str(Path(__file__).resolve()), kind, str(scratch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, cwd=ROOT,
        )  # fmt: skip

    def run(
        self, argv: Sequence[str], cwd: Path, *, address: int | None = None, seconds: int = 10,
        env: Mapping[str, str] | None = None,
    ) -> Ran:  # fmt: skip
        """Run a command line in `cwd` within `address` bytes of address space (of all it maps) and `seconds` of CPU."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        job = {"argv": list(argv), "cwd": str(cwd), "address": address, "seconds": seconds, "env": dict(env or {})}
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return Ran(**json.loads(stdout.readline()))

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


# --- the process itself ---------------------------------------------------------------------------------------------


def _serve(kind: str, scratch: Path) -> None:
    call = _callable(kind)
    for line in sys.stdin:
        job = json.loads(line)
        outputs = [scratch / f"{kind}-{os.getpid()}.{name}" for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            _become(job, outputs, call)
        print(json.dumps(_waited(child, job["seconds"], outputs)), flush=True)


def _callable(kind: str) -> Any:
    """What a forked child does with its arguments; None where it becomes another program."""
    if kind == "program":
        return None
    sys.path.insert(0, str(ROOT))
    if kind == "stock":
        from tests.attacks.stock import prepare

        return prepare()
    if kind == "probe":
        return _probe
    from mrrope_gguf import cli, extend, fit, inspect, inspect_text, metadata, verbs, verbs_chat
    from mrrope_gguf.chat import run
    from mrrope_gguf.gguf import edit, inplace, write

    # what a child would import for itself is imported, once, for all of them
    assert all((extend, fit, inspect, inspect_text, metadata, verbs, verbs_chat, run, edit, inplace, write))
    return cli.main


def _probe(argv: Sequence[str]) -> int:
    """Takes so many MiB, or does what a broken program does."""
    if argv[0] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while argv[0] == "spin":
        pass
    return len(bytearray(b"x") * (int(argv[0]) * MIB)) % 2  # every page written, or MemoryError


def _become(job: dict[str, Any], outputs: list[Path], call: Any) -> None:
    """The child: limits, streams, then the job; never returns."""
    code = 99
    try:
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        for stream, path in zip((1, 2), outputs, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
        if job["address"] is not None:
            resource.setrlimit(resource.RLIMIT_AS, (job["address"],) * 2)
        if call is None:
            os.execv(sys.executable, [sys.executable, "-m", "mrrope_gguf", *job["argv"]])
        code = call(job["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _waited(child: int, seconds: float, outputs: list[Path]) -> dict[str, Any]:
    end, hung, pause = time.monotonic() + 12 * seconds, False, 0.0005  # other work may have the processors
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end and not hung:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    out, err = (path.read_bytes().decode(errors="replace") if path.exists() else "" for path in outputs)
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": code, "hung": hung or code == -signal.SIGXCPU, "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024, "out": out, "err": err,
    }  # fmt: skip


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
