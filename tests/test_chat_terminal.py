"""The program on a pseudo-terminal, as a user has it: typing, pasting, Ctrl-C while it reads and writes, reopening."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import tiny
from tests.chat import MROPE, endless, run, surroundings
from tests.patched import ROOT
from tests.session_chat import BOOK, small

pytest.importorskip("prompt_toolkit", reason="the chat extra is not installed")
pytest.importorskip("rich", reason="the chat extra is not installed")
pytest.importorskip("fcntl", reason="pseudo-terminals are POSIX ones")
from tests import terminal

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("terminal"), n_ctx=4096)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads a long document for some seconds, and writes until it is stopped."""
    return endless(tmp_path_factory.mktemp("slow") / "slow.gguf", n_ctx=1 << 16, n_embd=256, n_layer=4)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., terminal.Terminal]:
    def started(*words: object) -> terminal.Terminal:
        return terminal.Terminal(
            [*MROPE, *map(str, words), "--temp", "0", "-t", "1"], surroundings(tmp_path / "data"), ROOT
        )

    return started


def ready(there: terminal.Terminal, n: int = 1, seconds: float = 60) -> str:
    """Wait for the n-th prompt, counting those that were answered, or stopped while they were read."""

    def shown(text: str) -> bool:
        said = len(meters(text)) + text.count("asking again goes on there")
        return bool(re.search(r"(?:^|\n)> ?$", text)) and said >= n - 1

    there.until(shown, "a prompt", seconds)
    return str(there.screen.text)


def written(question: str, text: str) -> bool:
    """Whether there is something of an answer."""
    return question in text and len(text.split(question)[-1]) > 200


def meters(text: str) -> list[str]:
    return re.findall(r"\[#* *\]  \d+ of \d+ tokens, \d+ %", text)


def saved(data: Path, name: str) -> list[dict[str, str]]:
    import json

    found = subprocess.run(
        [*MROPE[:-1], "sessions", "show", name, "--json"], cwd=ROOT, env=surroundings(data), capture_output=True,
        check=True,
    )  # fmt: skip
    messages: list[dict[str, str]] = json.loads(found.stdout)["messages"]
    return messages


def test_a_conversation(start: Callable[..., terminal.Terminal], model: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    with start(model, "-f", book, "--session", "sea", "-n", "12") as there:
        ready(there, 2)
        assert re.search(r"book\.txt +445 tokens  text", there.screen.text)
        there.line("one")
        ready(there, 3)
        # lines between triple quotes, a pasted text of several lines, and a line that Alt-Enter made longer
        there.line('"""two')
        there.line("lines")
        there.line('"""')
        ready(there, 4)
        there.paste("a pasted\ntext")
        there.line("")
        ready(there, 5)
        there.type("longer\x1b\r")
        there.line("line")
        ready(there, 6)
        there.line("/help")
        there.expect("/regen  +another answer")
        there.line("/set temp 0.0")
        there.expect("temp = 0.0")
        there.line("/undo")
        ready(there, 7)
        there.line("/nothing")
        there.expect("error: /nothing: there is no such command")
        there.line("/exit")
        assert there.ended() == 0
        assert "Traceback" not in there.screen.text
        assert "CPR" not in there.screen.text
    asked = [one["content"] for one in saved(tmp_path / "data", "sea")[::2]]
    assert asked == ["one", "two\nlines", "a pasted\ntext"]
    history = tmp_path / "data" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+a pasted\n+text" in history.read_text()
    # the same questions in one go give the same answers, and a new process goes on as this one would have
    plain = [run(model, "-f", book, "-p", text, "--session", "piped", "--temp", "0", "-t", "1", "-n", "12",
                 data=tmp_path / "data") for text in (*asked, "and then")]  # fmt: skip
    assert [one.returncode for one in plain] == [0] * 4
    wanted = saved(tmp_path / "data", "piped")
    assert wanted[:6] == saved(tmp_path / "data", "sea")
    with start("--session", "sea", "-n", "12") as there:
        ready(there, 2)
        assert "going on with sea: 3 turns so far" in there.screen.text
        assert re.search(r"restored \d+ tokens in", there.screen.text)
        there.type("\x1b[A")  # the history came along
        there.expect("/exit")
        there.type("\x03")
        there.line("and then")
        ready(there, 3)
        there.type("\x04")
        assert there.ended() == 0
    assert saved(tmp_path / "data", "sea") == wanted


def test_ctrl_c_while_reading(start: Callable[..., terminal.Terminal], slow: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(BOOK * 50)
    with start(slow, "-f", book, "-n", "4") as there:
        there.expect(r"reading \[.*tokens  \d+/s  .* left", 120)
        there.type("\x03")
        there.expect("stopping when this chunk is read|stopped: ")
        text = ready(there, 2, 120)
        found = re.search(r"stopped: (\d+) of (\d+) tokens are read and kept", text)
        assert found, text
        assert 0 < int(found[1]) < int(found[2])
        assert "reading [" not in text  # the bar is gone
        assert not meters(text)  # which would count what is not read
        # the next question goes on there, and is stopped too
        there.line("what now")
        there.expect(r"reading \[.*tokens", 120)
        there.type("\x03")
        ready(there, 3, 120)
        again = re.findall(r"stopped: (\d+) of", there.screen.text)
        assert int(again[1]) >= int(found[1])
        there.type("\x1b[A")  # the question is not lost
        there.until(lambda text: text.endswith("> what now"), "the question")
        there.type("\x03")  # takes it back
        there.type("\x03")
        there.expect("Ctrl-C again, Ctrl-D or /exit leaves")
        there.type("\x03")
        assert there.ended(60) == 0
        assert "Traceback" not in there.screen.text


def test_ctrl_c_while_writing(start: Callable[..., terminal.Terminal], slow: Path, tmp_path: Path) -> None:
    with start(slow, "--session", "x") as there:
        ready(there)
        there.line("the red hen")
        there.until(partial(written, "> the red hen"), "an answer")
        there.type("\x03")
        text = ready(there, 2)
        assert "stopped: what is written is kept, /regen answers again" in text
        there.line("/show")
        assert "session: x" in ready(there, 3)
        there.line("/regen")
        there.until(partial(written, "> /regen"), "another answer")
        there.type("\x03")
        ready(there, 4)
        there.type("\x04")
        assert there.ended() == 0
    (_, said) = saved(tmp_path / "data", "x")
    assert len(said["content"]) > 100


def test_what_is_typed_ahead_is_the_next_turn(
    start: Callable[..., terminal.Terminal], slow: Path, tmp_path: Path
) -> None:
    with start(slow, "--session", "x", "-n", "400") as there:
        ready(there)
        there.line("one")
        there.until(partial(written, "> one"), "an answer")
        there.line("typed ahead")
        text = ready(there, 3)
        assert text.count("typed ahead") == 1
        assert "> typed ahead" in text
        there.line("/regen")
        there.until(partial(written, "> /regen"), "another answer")
        there.paste("pasted\nahead")  # one turn, not two
        there.line("")
        assert "> pasted\n. ahead" in ready(there, 5)
        there.type("\x04")
        assert there.ended() == 0
        assert not there.screen.marks_pastes  # the shell gets its terminal as it was
    assert [one["content"] for one in saved(tmp_path / "data", "x")[::2]] == ["one", "typed ahead", "pasted\nahead"]


def test_a_model_cannot_command_the_terminal(start: Callable[..., terminal.Terminal], tmp_path: Path) -> None:
    """Random models write control characters all the time: the screen shows them written out."""
    hostile = tiny.make(tmp_path / "h.gguf", n_ctx=4096, seed=3)
    name = tmp_path / "evil\x1b[31m.txt"
    name.write_text(BOOK)
    with start(hostile, "-f", name, "-n", "300", "--top-k", "0", "-s", "1") as there:
        ready(there, 2)
        assert r"evil\e[31m.txt" in there.screen.text
        there.line("/set temp 1.5")
        there.line("one")
        text = ready(there, 3)
        assert re.search(r"\\x[01][0-9a-f]|\\e", text.split("> one")[-1])
        there.type("\x04")
        assert there.ended() == 0


def answered(text: str) -> bool:
    """Whether a meter ends the screen after turns were dropped."""
    return "[Y/n] y" in text and re.search(r"\] +\d+ of 512 tokens, \d+ %(\nnote: .*)?\n> ?$", text) is not None


def _answered_or_asked(n: int, text: str) -> bool:
    return "Forget" in text or len(meters(text)) >= n


def _asked_or_answered(n: int, text: str) -> bool:
    return text.count("Forget") == n or answered(text)


def test_a_full_context_is_asked_about(start: Callable[..., terminal.Terminal], tmp_path: Path) -> None:
    with start(small(tmp_path, n_ctx=512), "-n", "90", "--session", "x") as there:
        for n in range(1, 9):
            ready(there, n)
            there.line(f"question {n} of the men of the inn")
            there.until(partial(_answered_or_asked, n), "an answer")
            if "Forget" in there.screen.text:
                break
        there.expect(r"the context is full: \d+ tokens, and it holds 512")
        there.expect(r"  1 +\d+ tokens  question 1 of")
        there.line("n")
        there.expect("nothing was dropped")
        there.line("the same again, for the men of the inn ran on in the rain and on")
        # random answers are more tokens when they are read again than when they were written
        for n in range(2, 9):
            there.until(partial(_asked_or_answered, n), "the question again")
            if answered(there.screen.text):
                break
            there.line("y")
        ready(there)
        there.type("\x04")
        assert there.ended() == 0
    assert saved(tmp_path / "data", "x")[0]["content"] != "question 1 of the men of the inn"


def test_questions_before_loading(start: Callable[..., terminal.Terminal], model: Path, tmp_path: Path) -> None:
    """A document too long for the model, on stock: extending is offered, and done if wanted."""
    own = tmp_path / "own.gguf"
    shutil.copyfile(model, own)
    book = tmp_path / "book.txt"
    book.write_text(BOOK * 12)
    with start(own, "-f", book, "-n", "8") as there:
        there.expect(r"Extend it now\?.*\[Y/n\]")
        there.line("n")
        assert there.ended() == 1
        assert "mrrope extend" in there.screen.text.replace("\n", "")
    assert sorted(tmp_path.glob("*.gguf")) == [own]
    with start(own, "-f", book, "-n", "8") as there:
        there.expect(r"Extend it now\?.*\[Y/n\]")
        there.line("")
        text = ready(there, 2, 120)
        assert "own-ContextLength8k.gguf" in text
        assert "4096 tokens extended to 8192" in text
        assert "table is static here" in text.replace("\n", " ")
        there.line("one")
        assert "S = 2 of 2" in ready(there, 3)
        there.type("\x04")
        assert there.ended() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux counts them")
def test_memory_is_asked_about(tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "long.gguf", n_ctx=1 << 22)
    command = ["bash", "-c", 'ulimit -v 1300000; exec "$@"', "-", *MROPE, str(model), "-n", "4", "-t", "1"]
    with terminal.Terminal(command, surroundings(tmp_path / "data"), ROOT) as there:
        there.expect(r"What would fit:\n  1  -c \d+")
        there.line("")
        ready(there)
        there.line("one")
        ready(there, 2)
        there.type("\x04")
        assert there.ended() == 0
    with terminal.Terminal(command, surroundings(tmp_path / "data"), ROOT) as there:
        there.expect("What would fit:")
        there.line("n")
        assert there.ended() == 1
        assert "do not fit in memory" in there.screen.text


def test_without_the_extra_it_is_one_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['prompt_toolkit'] = None\n")
    env = surroundings(tmp_path) | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with terminal.Terminal([*MROPE, str(model)], env, ROOT) as there:
        assert there.ended() == 1
        assert "pip install 'mrrope-gguf[chat]'" in there.screen.text
        assert "Traceback" not in there.screen.text


def test_stdout_that_is_no_terminal(model: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out, terminal.Terminal(
        [*MROPE, str(model)], surroundings(tmp_path), ROOT, stdout=out.fileno()
    ) as there:  # fmt: skip
        assert there.ended() == 1
        assert "-p 'QUESTION'" in there.screen.text


def test_a_stage_is_told(patched: Path, tmp_path: Path) -> None:
    """On the patched engine, where the conversation outgrows the model's own window in the middle of an answer."""
    model = small(tmp_path, n_ctx=512)
    command = [*MROPE, str(model), "-c", "2048", "-n", "700", "--temp", "0", "-t", "1"]
    with terminal.Terminal(command, surroundings(tmp_path / "data", patched), ROOT, rows=60) as there:
        ready(there)
        assert "context: 2048 tokens, mrrope-uni to S = 4" in there.screen.text
        for n in range(2, 9):  # an answer may end where it likes
            there.line("one")
            text = ready(there, n)
            if "context grows" in text:
                break
        assert re.search(r"context grows at 5\d\d tokens: S = 1 -> 1\.58\n", text)
        assert re.search(r"tokens, \d+ %, S = (?!1 )[\d.]+ of 4\n", text)
        there.type("\x04")
        assert there.ended() == 0


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    env = surroundings(tmp_path / "data", NO_COLOR="1")
    with terminal.Terminal([*MROPE, str(model), "-n", "8", "-t", "1"], env, ROOT) as there:
        there.expect("note: what is typed is not kept: ")
        ready(there)
        there.line("one")
        ready(there, 2)
        there.line("/save")
        there.expect("note: not saved, the conversation goes on")
        there.type("\x1b[A\x1b[A")
        there.expect("> one$")
        there.type("\x03\x04")
        assert there.ended() == 0
        assert "Traceback" not in there.screen.text
