"""One model on one backend, in a process of its own: logits under tables, re-rotations and shifts, and where RoPE ran.

`run` starts the process, `rpc_server` a remote device on the loopback interface. A process loads one libllama, hence
the processes; a crash of a backend is then a failed test and not a dead pytest.
"""

from __future__ import annotations

import ctypes
import io
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import patched

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

F32, F16, Q8_0 = 0, 1, 8
ALL_LAYERS = 999
# how many tokens a context shift removes from the front
SHIFT = 16
# positions whose cells are emptied before a table comes: runs of cells that are left begin anywhere
HOLES = ((3, 5), (9, 10), (17, 24), (25, 31))
SCENARIOS = ("plain", "table", "rerotated", "restored", "shifted", "afresh", "holes", "holes_afresh")


@dataclass(frozen=True)
class Job:
    """What to run. `devices` are ggml's names (none: the CPU); `endpoints` are RPC servers, which become RPC0, RPC1...

    `factors` (n_rot/2,) and `attn_factor` are the table; `tokens` are decoded at positions 0, 1, ...; half of them
    are in the cache when a table changes or the context shifts. `type_k` is the ggml type of the K cache; V is f16.
    `reserve` sets a table once before any computation: no later one makes a bigger compute buffer.
    """

    model: Path
    tokens: tuple[int, ...]
    factors: tuple[float, ...]
    attn_factor: float
    devices: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    type_k: int = F16
    flash: bool = False
    reserve: bool = False
    only: tuple[str, ...] = SCENARIOS


@dataclass(frozen=True)
class Result:
    """Logits (n_tokens, n_vocab) of each scenario; of the later half of the tokens where the cache changed under them.

    plain: as the file says, no table or an elastic one. table: from the start. rerotated: the table came when half the
    tokens were cached. restored: it came then, and went again. shifted: under the table, the first SHIFT tokens removed
    and the rest moved up by as many. afresh: the tokens of `shifted` decoded where it moved them. holes: as
    `rerotated`, with HOLES in the cache. holes_afresh: the same with the table from the start.
    """

    logits: dict[str, Floats]
    log: str
    stderr: str

    def __getitem__(self, scenario: str) -> Floats:
        return self.logits[scenario]

    @property
    def rope(self) -> dict[str, Counter[str]]:
        """How many ROPE nodes the scheduler gave to each backend, by phase: a scenario, "before" or "after" it."""
        phases: dict[str, Counter[str]] = {}
        pieces = PHASE.split(self.log)
        for phase, text in zip(pieces[1::2], pieces[2::2], strict=True):
            splits = SPLIT.split(text)
            for backend, nodes in zip(splits[1::2], splits[2::2], strict=True):
                phases.setdefault(phase, Counter())[backend] += len(NODE.findall(nodes))
        return {phase: +nodes for phase, nodes in phases.items()}

    @property
    def cache(self) -> set[str]:
        """The backends that hold the KV cache; an RPC server is "RPC0[its endpoint]", whatever device it became."""
        return set(KV_BUFFER.findall(self.log))

    @property
    def offloaded(self) -> tuple[int, int] | None:
        """(layers on devices, layers of the model); None on the CPU."""
        found = OFFLOADED.search(self.log)
        return (int(found[1]), int(found[2])) if found else None


NODE = re.compile(r"node #\s*\d+ \(\s*ROPE\):")
SPLIT = re.compile(r"^## SPLIT #\d+: (\S+) # \d+ inputs", re.MULTILINE)
PHASE = re.compile(r"^@@ (\S+)$", re.MULTILINE)
KV_BUFFER = re.compile(r"llama_kv_cache:\s+(\S+) KV buffer size")
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers")


def run(job: Job, lib: Path, **env: str) -> Result:
    """Run `job` on the libllama in `lib`, with `env` set. Raises patched.Failed with what the process said."""
    (logits, log), stderr = patched.run_said(work, job, lib=lib, env={"GGML_SCHED_DEBUG": "2", **env})
    return Result(logits, log, stderr)


def distance(a: Floats, b: Floats) -> float:
    """Root mean square of a - b, in units of b's standard deviation."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)) / np.std(b.astype(np.float64)))


@contextmanager
def rpc_server(program: Path) -> Iterator[str]:
    """A ggml-rpc-server with one thread of the CPU as its device: "127.0.0.1:port". It ends with the block.

    Raises RuntimeError with what it said if it does not listen.
    """
    for _ in range(5):
        port = _free_port()
        command = [str(program), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--device", "CPU"]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
        )
        try:
            if _listens(server, port):
                yield f"127.0.0.1:{port}"
                return
        finally:
            server.kill()
            said = server.communicate()[0]
    raise RuntimeError(f"{program} does not listen: {said[-1000:].decode(errors='replace')}")


def _end_with_parent() -> None:
    """On Linux the server does not outlive even a killed pytest."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _free_port() -> int:
    """A port nobody listens on; another process may still take it first, which is why rpc_server tries again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(server: subprocess.Popen[bytes], port: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False


# --- from here on: inside the process that loads libllama ---


def work(job: Job) -> tuple[dict[str, Floats], str]:
    """Every scenario's logits, and llama.cpp's log with a line "@@ phase" where each begins."""
    log = io.StringIO()
    engine = Engine(job, log)
    return {name: getattr(engine, name)() for name in job.only}, log.getvalue()


def rpc_function(lib: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml's RPC backend, as llama.cpp's own programs find it."""
    lib.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    lib.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    lib.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    registry = lib.ggml_backend_reg_by_name(b"RPC")
    address = lib.ggml_backend_reg_get_proc_address(registry, name.encode()) if registry else None
    if not address:
        raise RuntimeError("this libllama was built without the RPC backend")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


class Engine:
    """The model of a job on its devices; each scenario has a context of its own."""

    def __init__(self, job: Job, log: io.StringIO) -> None:
        from llama_cpp import llama_cpp as api

        self.job, self.log, self.api = job, log, api
        self.half = len(job.tokens) // 2
        self.listener = api.llama_log_callback(lambda _level, text, _: log.write(text.decode("utf-8", "replace")))
        api.llama_log_set(self.listener, None)
        api.llama_backend_init()
        self.model = self._load(self._devices(api._lib))

    def _devices(self, lib: ctypes.CDLL) -> list[int]:
        """Handles of the job's devices, its RPC servers registered first."""
        lib.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        lib.ggml_backend_register.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_register.restype = None
        for endpoint in self.job.endpoints:
            add = rpc_function(lib, "ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
            lib.ggml_backend_register(add(endpoint.encode()))
        handles = [lib.ggml_backend_dev_by_name(name.encode()) for name in self.job.devices]
        if None in handles:
            raise RuntimeError(f"not all of {self.job.devices} are there")
        return handles

    def _load(self, handles: list[int]) -> Any:
        params = self.api.llama_model_default_params()
        # an empty list keeps every accelerator out of it; no list at all would take them all
        self.devices = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        self.shares = (ctypes.c_float * self.api.llama_max_devices())(*[1.0] * len(handles))
        params.devices = ctypes.cast(self.devices, ctypes.c_void_p)
        params.tensor_split = self.shares
        params.n_gpu_layers = ALL_LAYERS if handles else 0
        model = self.api.llama_model_load_from_file(str(self.job.model).encode(), params)
        if not model:
            raise RuntimeError(f"{self.job.model} does not load: {self.log.getvalue()[-2000:]}")
        return model

    @contextmanager
    def context(self, phase: str) -> Iterator[Any]:
        params = self.api.llama_context_default_params()
        params.n_ctx = 2 * len(self.job.tokens)
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k, params.type_v = self.job.type_k, F16
        params.flash_attn_type = int(self.job.flash)
        ctx = self.api.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError(f"no context: {self.log.getvalue()[-2000:]}")
        if self.job.reserve:
            self._reserve(ctx)
        self.phase(phase)
        try:
            yield ctx
        finally:
            self.phase("end")
            self.api.llama_free(ctx)

    def _reserve(self, ctx: Any) -> None:
        from mrrope_gguf import engine

        if engine.get_elastic(ctx).on:
            engine.set_elastic(ctx, False)
            engine.set_elastic(ctx, True)
        else:
            self.set_table(ctx, True)
            self.set_table(ctx, False)

    def phase(self, name: str) -> None:
        self.log.write(f"\n@@ {name}\n")

    def set_table(self, ctx: Any, on: bool) -> None:
        from mrrope_gguf.engine import rope_table

        if on:
            rope_table.set_factors(ctx, self.job.factors, self.job.attn_factor)
        else:
            rope_table.set_table(ctx, None)

    def decode(self, ctx: Any, tokens: Sequence[int], first: int) -> Floats:
        from tests.stock import decode

        return decode(ctx, tokens, first)

    def plain(self) -> Floats:
        with self.context("plain") as ctx:
            return self.decode(ctx, self.job.tokens, 0)

    def table(self) -> Floats:
        with self.context("table") as ctx:
            self.set_table(ctx, True)
            return self.decode(ctx, self.job.tokens, 0)

    def rerotated(self) -> Floats:
        return self._switched("rerotated", [True])

    def restored(self) -> Floats:
        return self._switched("restored", [True, False])

    def _switched(self, name: str, tables: Sequence[bool]) -> Floats:
        with self.context("before") as ctx:
            self.decode(ctx, self.job.tokens[: self.half], 0)
            self.phase(name)
            for on in tables:
                self.set_table(ctx, on)
            self.phase("after")
            return self.decode(ctx, self.job.tokens[self.half :], self.half)

    def shifted(self) -> Floats:
        with self.context("before") as ctx:
            self.set_table(ctx, True)
            self.decode(ctx, self.job.tokens[: self.half], 0)
            self.remove(ctx, 0, SHIFT)
            self.api.llama_memory_seq_add(self.api.llama_get_memory(ctx), 0, SHIFT, -1, -SHIFT)
            self.phase("shifted")
            return self.decode(ctx, self.job.tokens[self.half :], self.half - SHIFT)

    def afresh(self) -> Floats:
        with self.context("afresh") as ctx:
            self.set_table(ctx, True)
            return self.decode(ctx, self.job.tokens[SHIFT:], 0)[self.half - SHIFT :]

    def holes(self) -> Floats:
        return self._holed("holes", before=False)

    def holes_afresh(self) -> Floats:
        return self._holed("holes_afresh", before=True)

    def _holed(self, name: str, before: bool) -> Floats:
        with self.context("before") as ctx:
            self.set_table(ctx, before)
            self.decode(ctx, self.job.tokens[: self.half], 0)
            for first, end in HOLES:
                self.remove(ctx, first, end)
            self.phase(name)
            self.set_table(ctx, True)
            return self.decode(ctx, self.job.tokens[self.half :], self.half)

    def remove(self, ctx: Any, first: int, end: int) -> None:
        """Empty the cells of positions first to end."""
        if not self.api.llama_memory_seq_rm(self.api.llama_get_memory(ctx), 0, first, end):
            raise RuntimeError(f"the memory does not give up positions {first} to {end}")
