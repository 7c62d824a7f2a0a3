"""One question, one answer: stdout is the model's text alone, exit codes, and every bad input one error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.chat import MROPE, as_root, endless, run, surroundings
from tests.patched import ROOT
from tests.session_chat import BOOK, small, states

pytestmark = pytest.mark.engine
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits as POSIX has them")
GREEDY = ("--temp", "0", "-n", "12", "-t", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("once"))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


def failed(done: subprocess.CompletedProcess[bytes], *words: str) -> str:
    """The error of a run that must have ended with one: three lines, nothing on stdout, exit code 1."""
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (1, b""), text
    assert "Traceback" not in text
    error = text[text.index("error: ") :]
    assert re.match(r"error: .+\n  why: (?s:.+)\n  fix: .+\n$", error), text
    for word in words:
        assert word in error
    return error


def test_stdout_is_the_models_text_alone(model: Path, book: Path, tmp_path: Path) -> None:
    from mrrope_gguf.model import load
    from mrrope_gguf.session import ChatSession

    llm = load(model, n_threads=1, n_threads_batch=1)
    wanted = ChatSession(llm, documents=[("book.txt", BOOK)], store=False, temp=0, n_predict=12).ask("the red hen")
    llm.close()
    by_flag = run(model, "-f", book, "-p", "the red hen", *GREEDY, data=tmp_path / "a")
    assert by_flag.returncode == 0
    assert by_flag.stdout == wanted.encode() + b"\n"
    talk = by_flag.stderr.decode()
    for part in (
        "m.gguf: llama, 2048 tokens of context",
        "engine: stock llama.cpp",
        "memory: weights",
        "of 2048 tokens",
    ):
        assert part in talk
    assert re.search(r"book\.txt +\d+ tokens  text\n", talk)
    assert "\x1b" not in talk
    by_pipe = run(model, "-f", book, *GREEDY, data=tmp_path / "b", given=b"the red hen\n")
    assert (by_pipe.returncode, by_pipe.stdout) == (0, by_flag.stdout)
    # the second time the document is not read again
    again = run(model, "-f", book, "-p", "the red hen", *GREEDY, data=tmp_path / "a")
    assert again.stdout == by_flag.stdout
    assert "restored" in again.stderr.decode()


def test_a_named_session_goes_on(model: Path, book: Path, tmp_path: Path) -> None:
    first = run(model, "-f", book, "-p", "one", "--session", "sea", *GREEDY, data=tmp_path)
    second = run("-p", "two", "--session", "sea", *GREEDY, data=tmp_path)  # it knows its model and its document
    assert (first.returncode, second.returncode) == (0, 0)
    assert "restored" in second.stderr.decode()
    whole = run(model, "-f", book, "-p", "one", "--session", "other", *GREEDY, data=tmp_path)
    assert whole.stdout == first.stdout
    both = run(model, "-f", book, "-p", "two", "--session", "other", *GREEDY, data=tmp_path)
    assert both.stdout == second.stdout
    other = tmp_path / "other.txt"
    other.write_text("a tin hat")
    failed(run("-f", other, "-p", "x", "--session", "sea", data=tmp_path), "has another beginning")


@POSIX
def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    model = endless(tmp_path / "m.gguf", n_ctx=1 << 16)
    with subprocess.Popen(
        [*MROPE, str(model), "-p", "the red hen", "--session", "x", "--temp", "0", "-t", "1"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=surroundings(tmp_path),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        head = os.read(process.stdout.fileno(), 10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopped: what is written is kept" in err
    assert b"Traceback" not in err
    shown = subprocess.run(
        [*MROPE[:-1], "sessions", "show", "x", "--json"], cwd=ROOT, env=surroundings(tmp_path), capture_output=True,
        check=True,
    ).stdout  # fmt: skip
    import json

    assert json.loads(shown)["messages"][1]["content"].encode() == (head + out).removesuffix(b"\n")


@POSIX
def test_a_reader_that_goes_away(model: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*MROPE, str(model), "-p", "the red hen", "--temp", "0", "-t", "1"], stdin=subprocess.DEVNULL, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings(tmp_path),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert b"Traceback" not in err


def test_a_full_context_is_an_error_after_what_was_written(tmp_path: Path) -> None:
    model = small(tmp_path, n_ctx=512)
    done = run(model, "-p", "the red hen", "--temp", "0", "-t", "1", data=tmp_path)
    assert done.returncode == 1
    assert len(done.stdout) > 100
    error = done.stderr.decode()
    assert "error: the answer has filled the context" in error
    assert "-c 1792, or a shorter text" in error


BAD: dict[str, bytes] = {"empty.txt": b"", "blank.txt": b" \n\n", "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(64)}


@pytest.mark.parametrize("name", BAD)
def test_documents_that_are_none(model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name])
    failed(run(model, "-f", path, "-p", "x", data=tmp_path), name)


def test_missing_things(model: Path, tmp_path: Path) -> None:
    failed(run(tmp_path / "no.gguf", "-p", "x", data=tmp_path), "no.gguf")
    failed(run("-p", "x", data=tmp_path), "no model is named")
    failed(run("-f", model, "-p", "x", data=tmp_path), "not a text")
    failed(run(model, "-f", tmp_path / "no.txt", "-p", "x", data=tmp_path), "no.txt: no such file")
    (tmp_path / "rubbish.gguf").write_bytes(b"rubbish" * 20)
    failed(run(tmp_path / "rubbish.gguf", "-p", "x", data=tmp_path), "rubbish.gguf")
    failed(run(model, data=tmp_path), "there is no question")
    failed(run(model, "-p", " ", data=tmp_path), "there is no question")
    failed(run(model, data=tmp_path, given=bytes(range(256)) * 4), "stdin: this is")
    failed(run(model, "-p", "x", "--session", "a/b\n", data=tmp_path), "cannot be a session's name")
    failed(run(model, "-p", "x", "--temp", "nan", data=tmp_path), "it is no number")


def test_a_document_longer_than_the_window(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(BOOK * 8)
    error = failed(run(model, "-f", path, "-p", "x", data=tmp_path), "mrrope extend")  # stock: extending is the way
    assert "--ctx 8192" in error
    failed(run(model, "-f", path, "-p", "x", "-c", "1024", data=tmp_path), "does not fit in the context", "1024")
    assert not states(tmp_path / "sessions")


def _no_privilege() -> None:
    """Root obeys permissions too, without two of its capabilities; in the child, before it is the program."""
    import ctypes

    if as_root():
        drop_from_bounding_set, dac_override, dac_read_search = 24, 1, 2
        for capability in (dac_override, dac_read_search):
            assert ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_folder_that_cannot_be_written(model: Path, book: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o500)
    done = run(model, "-f", book, "-p", "x", *GREEDY, data=data, preexec_fn=_no_privilege)
    assert done.returncode == 0
    assert done.stdout
    assert b"note: not saved, the conversation goes on" in done.stderr
    failed(run(model, "-p", "x", "--session", "s", *GREEDY, data=data, preexec_fn=_no_privilege), "MRROPE_DATA")
    assert list(data.iterdir()) == []
    data.chmod(0o700)
    # what was kept before it became read-only is used
    kept = run(model, "-f", book, "-p", "x", "--session", "s", *GREEDY, data=data)
    folders = [folder for folder in (data, *data.rglob("*")) if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    again = run(model, "-f", book, "-p", "x", *GREEDY, data=data, preexec_fn=_no_privilege)
    for folder in folders:
        folder.chmod(0o700)
    assert again.stdout == kept.stdout
    assert b"restored" in again.stderr


@POSIX
def test_a_data_folder_that_is_none(model: Path, book: Path, tmp_path: Path) -> None:
    """As with a folder that cannot be written: the answer is there, only a named session is an error."""
    (tmp_path / "data").write_text("a file")
    done = run(model, "-f", book, "-p", "x", *GREEDY, data=tmp_path / "data")
    assert done.returncode == 0
    assert done.stdout
    assert b"note: " in done.stderr
    failed(run(model, "-p", "x", "--session", "s", *GREEDY, data=tmp_path / "data"), "data", "MRROPE_DATA")


@POSIX
def test_a_full_disk(model: Path, book: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the answer is there, and what was kept before too."""
    import resource

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    kept = run(model, "-f", book, "-p", "one", "--session", "s", *GREEDY, data=tmp_path)
    assert kept.returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    done = run("-p", "two", "--session", "s", *GREEDY, data=tmp_path, preexec_fn=small_files)
    assert done.returncode == 0
    assert done.stdout
    assert b"note: the session was not saved" in done.stderr
    assert all(path.read_bytes() == data for path, data in before.items())
    goes_on = run("-p", "two", "--session", "s", *GREEDY, data=tmp_path)
    assert goes_on.stdout == done.stdout


@POSIX
def test_never_more_memory_than_there_is(tmp_path: Path) -> None:
    """Under a real limit: more than fits is refused before it loads, and what is said to fit does."""
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1200 << 20, 1200 << 20))

    model = tiny.make(tmp_path / "long.gguf", n_ctx=1 << 22)
    error = failed(run(model, "-p", "x", *GREEDY, data=tmp_path, preexec_fn=limited), "do not fit in memory", "weights")
    found = re.search(r"fix: -c (\d+)", error)
    assert found, error
    n_ctx = int(found[1])
    assert n_ctx > 10000
    done = run(model, "-p", "x", "-c", n_ctx, *GREEDY, data=tmp_path, preexec_fn=limited)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout
    assert f"context: {n_ctx} tokens" in done.stderr.decode()
    failed(run(model, "-p", "x", "-c", 3 * n_ctx, *GREEDY, data=tmp_path, preexec_fn=limited), "do not fit")


def test_without_the_engine_it_is_one_error(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from mrrope_gguf.cli import main\n"
        f"sys.exit(main(['chat', {str(model)!r}, '-p', 'x']))"
    )
    began = time.monotonic()
    done = subprocess.run(
        [MROPE[0], "-c", code], cwd=ROOT, env=surroundings(tmp_path), capture_output=True, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    failed(done, "llama-cpp-python", "pip install")
    assert time.monotonic() - began < 30


def test_a_model_from_the_hub(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    from tests.hub_server import Repo, serving

    with serving({"user/tiny": Repo({"tiny-Q8_0.gguf": model.read_bytes()})}) as hub:
        env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        done = run("-hf", "user/tiny:Q8_0", "-p", "one", *GREEDY, data=tmp_path / "a", env=env)
        missing = run("-hf", "user/none", "-p", "one", *GREEDY, data=tmp_path / "a", env=env)
    assert done.returncode == 0, done.stderr.decode()
    assert b"tiny-Q8_0.gguf: llama, 2048 tokens of context" in done.stderr
    assert done.stdout == run(model, "-p", "one", *GREEDY, data=tmp_path / "b").stdout
    failed(missing, "there is no such repository")
