"""Passes on a real Dask cluster of two worker processes, of which one is killed: nothing lost, nothing doubled."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import EngineTrouble, MrropeError, Refused
from mrrope_gguf.evals import plans, suite
from mrrope_gguf.evals.cluster import connect
from mrrope_gguf.evals.suite import NAME, Suite, open_host
from tests import tiny
from tests.eval_suite import Cells, cells, lines, prose, request, run
from tests.patched import environment

pytestmark = pytest.mark.engine

distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")
WAYS = "none,truncate,linear,yarn@B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster")
    tiny.make(path / "m.gguf", n_layer=1, n_ctx=512)
    prose(path / "t.txt", 1200)
    prose(path / "u.txt", 1200, seed=1)
    return path


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and two workers, on the stock library."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL,
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as cluster:  # fmt: skip
        yield cluster.scheduler_address


def asked(folder: Path, what: str = "ppl") -> Any:
    named = {"texts": [str(folder / name) for name in ("t.txt", "u.txt")]} if what == "ppl" else {}
    return request(what, WAYS, (1024, 2048), **({"depths": (0.0,)} if what == "needle" else named))


@pytest.fixture(scope="module")
def local(folder: Path, stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """What one process finds."""
    found: Cells = stock.call(run, folder / "m.gguf", asked(folder), tmp_path_factory.mktemp("local"))
    return cells(found)


def opened(folder: Path, out: Path, wanted: Any, model: str = "m.gguf") -> Suite:
    spec, lengths, window = plans.make_spec(folder / model, wanted)
    with open_host(spec) as host:
        made = Suite(spec, plans.make_passes(host.plain(), spec, wanted, lengths, window), out)
        made.open(host)
    return made


def workers(address: str) -> list[int]:
    with distributed.Client(address, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def whole(made: Suite, local: Cells) -> None:
    found = lines(made.log.path.parent)
    assert len(found) == len(set(found))
    assert cells(made.log.runs()) == local


def kill_within_a_pass(client: Any) -> tuple[int, set[str]]:
    """SIGKILL a worker that has passes: its process, and what Dask calls these. No process where none has any."""
    for worker, pid in client.run(os.getpid).items():
        os.kill(pid, signal.SIGSTOP)  # so that it finishes none meanwhile
        time.sleep(0.1)  # what it has said is heard
        if held := set(client.processing()[worker]):
            os.kill(pid, signal.SIGKILL)
            return pid, held
        os.kill(pid, signal.SIGCONT)
    return 0, set()


def test_a_worker_is_killed(folder: Path, address: str, local: Cells, tmp_path: Path) -> None:
    made = opened(folder, tmp_path, asked(folder))
    before = workers(address)
    assert len(before) == 2
    told: list[tuple[str, int, int]] = []
    killed, held = 0, set[str]()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal killed, held
        told.append((what, done, total))
        if not killed:
            killed, held = kill_within_a_pass(client)

    with connect(address) as executor, distributed.Client(address, set_as_default=False) as client:
        outcome = made.submit(executor, progress)
        removed = [event for _, event in client.get_events("all") if event.get("action") == "remove-worker"]
    whole(made, local)
    assert held
    assert held <= removed[-1]["processing-tasks"]  # it died with them in its hands
    assert outcome.left == 0
    assert told[-1][1:] == (outcome.cells, outcome.cells)
    assert len(told) == len({what for what, _, _ in told}) == len(made.passes)
    deadline = time.monotonic() + 30
    while len(after := workers(address)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(before) - set(after) == {killed}


def test_it_goes_on_where_a_process_stopped(folder: Path, address: str, local: Cells, tmp_path: Path) -> None:
    """Half of the cells are there, among them parts of passes; only the others are made."""
    made = opened(folder, tmp_path, asked(folder))
    made.log.path.parent.mkdir(exist_ok=True)
    for key in list(local)[::2]:
        made.log.add("#head", made._head) if not made.log.runs() else None
        made.log.add(key, local[key])
    had = lines(tmp_path)
    with connect(address) as executor:
        outcome = made.submit(executor)
    whole(made, local)
    assert outcome.cells <= len(local) - len(had)
    with connect(address) as executor:
        assert made.submit(executor).cells == 0


def test_tasks_and_truncation(folder: Path, address: str, stock: Any, tmp_path: Path) -> None:
    wanted = asked(folder, "needle")
    alone = cells(stock.call(run, folder / "m.gguf", wanted, tmp_path / "alone"))
    made = opened(folder, tmp_path / "out", wanted)
    with connect(address) as executor:
        made.submit(executor)
    whole(made, alone)


def test_what_a_pass_raises_comes_back_when_the_others_are_done(
    folder: Path, address: str, local: Cells, tmp_path: Path
) -> None:
    made = opened(folder, tmp_path, asked(folder))
    text = (folder / "u.txt").read_text()
    try:
        (folder / "u.txt").write_text("Other words.")
        with pytest.raises(Refused, match="not the text these results began with"), connect(address) as executor:
            made.submit(executor)
    finally:
        (folder / "u.txt").write_text(text)
    assert cells(made.log.runs()) == {key: cell for key, cell in local.items() if "/u/" not in key}
    with connect(address) as executor:
        made.submit(executor)
    whole(made, local)


def test_a_worker_with_another_engine_or_model(folder: Path, tmp_path: Path) -> None:
    made = opened(folder, tmp_path, asked(folder))
    task = made.passes[0]
    with pytest.raises(Refused, match="another engine than this suite's"):
        suite.work(made.spec, task, (), "patched llama.cpp 1 abc on CPU")
    other = tiny.make(tmp_path / "m.gguf", n_layer=1, n_ctx=512, seed=1)
    spec = replace(made.spec, model=str(other))
    with pytest.raises(Refused, match="another model than this suite's"):
        suite.work(spec, task, (), made._head["engine"])


@pytest.mark.parametrize("split", [None, 3])
def test_a_model_replaced_between_two_passes(folder: Path, tmp_path: Path, split: int | None) -> None:
    """A worker lives for days: it refuses another model at the old path, and takes one that was agreed on anew."""
    made = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        made.append(tiny.make(tmp_path / str(seed) / "m.gguf", n_layer=1, n_ctx=512, seed=seed, split=split))
    last = made[0].name.replace("00001-of", "00003-of")
    shard, other, third = (path.with_name(last) for path in made)

    first = opened(tmp_path / "0", tmp_path / "out", asked(folder), made[0].name)
    engine, task = first._head["engine"], first.passes[0]
    wanted = suite.work(first.spec, task, (), engine)
    then = shard.stat()
    assert other.stat().st_size == then.st_size
    os.utime(other, ns=(then.st_atime_ns, then.st_mtime_ns))
    os.replace(other, shard)  # of the same size and age
    with pytest.raises(Refused, match="another model than this suite's"):
        suite.work(first.spec, task, (), engine)
    second = opened(tmp_path / "0", tmp_path / "again", asked(folder), made[0].name)
    found = suite.work(second.spec, task, (), engine)
    assert [key for key, _ in found] == [key for key, _ in wanted]
    assert found != wanted
    shard.write_bytes(third.read_bytes())  # in place
    os.utime(shard, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
    with pytest.raises(Refused, match="another model than this suite's"):
        suite.work(second.spec, task, (), engine)
    suite._hosts.pop()[1].close()


def test_workers_that_all_die(folder: Path, tmp_path: Path) -> None:
    """An executor that gives a pass up ends in one error that says which."""

    class Broken(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            failed: Future[Any] = Future()
            failed.set_exception(RuntimeError("the worker died 4 times"))
            return failed

    made = opened(folder, tmp_path, asked(folder))
    executor: Executor = Broken(1)
    with executor, pytest.raises(EngineTrouble, match="no worker finished it") as caught:
        made.submit(executor)
    assert "the worker died 4 times" in caught.value.why


def test_threads_take_turns(folder: Path, local: Cells, tmp_path: Path) -> None:
    """A worker of several threads has one model all the same."""
    made = opened(folder, tmp_path, asked(folder))
    with ThreadPoolExecutor(3) as executor:
        made.submit(executor)
    whole(made, local)
    assert len(suite._hosts) == 1
    suite._hosts.pop()[1].close()


# --- the command -------------------------------------------------------------------------------------------------


def command(folder: Path, out: Path, address: str) -> subprocess.Popen[str]:
    texts = [str(folder / "t.txt"), str(folder / "u.txt")]
    words = ["eval", "ppl", str(folder / "m.gguf"), "--methods", WAYS, "--text", *texts, "--lengths", "1024,2048"]
    words += ["-t", "1", "-fa", "off", "--out", str(out), "--cluster", address]
    return subprocess.Popen(
        [sys.executable, "-m", "mrrope_gguf", *words], env=environment(None), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_command(folder: Path, address: str, local: Cells, tmp_path: Path) -> None:
    process = command(folder, tmp_path, address)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert out.splitlines()[-1] == str(tmp_path / "report.html")
    found = lines(tmp_path)
    assert sorted(found) == sorted(local)


def test_ctrl_c(folder: Path, address: str, local: Cells, tmp_path: Path) -> None:
    """It ends without waiting for passes that run, and what came back is kept."""
    process = command(folder, tmp_path, address)
    while process.poll() is None and not ((tmp_path / NAME).exists() and len(lines(tmp_path)) > 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    had = lines(tmp_path)
    process = command(folder, tmp_path, address)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert lines(tmp_path)[: len(had)] == had
    assert sorted(lines(tmp_path)) == sorted(local)


def loops() -> int:
    """Dask's own threads here."""
    return sum(thread.name == "IO loop" for thread in threading.enumerate())


def test_nobody_answers(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MrropeError, match="no Dask scheduler answers there"), connect(nobody, timeout="1s"):
            pass
        process = command(folder, tmp_path, nobody)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: " in said
    assert "no Dask scheduler answers there" in said
    assert "Traceback" not in said
    before = loops()
    for address in ("nonsense", "gopher://x:1", "tcp://"):
        with pytest.raises(MrropeError, match="no Dask scheduler answers there"), connect(address, timeout="1s"):
            pass
    assert loops() <= before
