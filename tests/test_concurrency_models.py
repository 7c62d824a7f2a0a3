"""Several processes with models: chats on one session, chats that keep the same state, evaluations into one folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mrrope_gguf.evals import report_read
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.sessions.store import Store
from tests.eval_suite import cells, model, prose
from tests.race import Ended, race, verb
from tests.session_chat import BOOK, small, states

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")]


def chats(tmp_path: Path, i: int, n: int, *words: str) -> list[Ended]:
    """n chats that ask one question at the same moment, with one data folder."""
    path = tmp_path / "m.gguf"
    if not path.exists():
        small(tmp_path)
        (tmp_path / "book.txt").write_text(BOOK)
    job = verb("chat", path, "-p", "hello", "-n", "6", "-t", "1", "--temp", "0", "-f", tmp_path / "book.txt", *words)
    return race(tmp_path / f"race{i}", [job] * n, {"MRROPE_DATA": str(tmp_path / "data")})


@pytest.mark.parametrize("n", [1, pytest.param(15, marks=pytest.mark.hard)])
def test_chats_on_one_session(tmp_path: Path, n: int) -> None:
    """One has it at a time; the others are told so, and what was said stays in order."""
    said = 0
    for i in range(n):
        ended = chats(tmp_path, i, 3, "--session", "s")
        winners = [each for each in ended if each.code == 0]
        assert winners, ended
        for each in ended:
            if each.code:
                assert each.code == 1
                assert "the session 's' is open elsewhere" in each.err
                assert "take another name" in each.err
                assert each.out == ""
        said += len(winners)
        values = json.loads((tmp_path / "data" / "sessions" / "named" / "s.json").read_text())
        assert [message["role"] for message in values["messages"]] == ["user", "assistant"] * said
        assert not list((tmp_path / "data").rglob("*.tmp"))


def test_chats_that_keep_the_same_state(tmp_path: Path) -> None:
    """Without a name all of them go on; what is kept is whole."""
    assert [each.code for each in chats(tmp_path, 0, 3)] == [0, 0, 0]
    store = Store(tmp_path / "data" / "sessions")
    kept = states(tmp_path / "data" / "sessions")
    assert kept
    assert all(store.head(path) is not None for path in kept)
    assert not list((tmp_path / "data").rglob("*.tmp"))


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.hard)])
def test_evals_into_one_folder(tmp_path: Path, n: int) -> None:
    """Those that belong together share the work; one of another scale is refused, or refuses them if it came first."""
    path, text = model(tmp_path), prose(tmp_path / "t.txt", 400)

    def job(out: Path, scale: str) -> list[str]:
        asked = ("--methods", "none,truncate", "--lengths", "512", "--text", text, "-t", "1", "-fa", "off")
        return verb("eval", "ppl", path, *asked, "--scale", scale, "--out", out)

    places = {"MRROPE_CACHE": str(tmp_path / "cache"), "MRROPE_DATA": str(tmp_path / "data")}
    out, alone = tmp_path / "out", tmp_path / "alone"
    ended = race(tmp_path / "race", [*[job(out, "4")] * n, job(out, "2")], places, timeout=900)
    assert [each.code for each in race(tmp_path / "race-alone", [job(alone, "4")], places)] == [0]
    first = json.loads((out / "results.jsonl").read_text().split("\n")[0])
    for each, scale in zip(ended, [4] * n + [2], strict=True):
        if scale == first["scale"]:
            assert each.code == 0, each.err
        else:
            assert each.code == 1
            assert "they belong to something else" in each.err
            assert "the scale was" in each.err
    found, wanted = cells(RunLog(out / "results.jsonl").runs()), cells(RunLog(alone / "results.jsonl").runs())
    assert found == wanted  # whole, and each cell's numbers those of a run by itself
    assert report_read.read(out).skipped == 0
    assert {name.suffix for name in out.iterdir()} == {".jsonl", ".csv", ".md", ".html", ".png", ".svg"}
    assert {p.name for p in (tmp_path / "cache" / "evals").iterdir()} <= {"key"}  # no state was left
