"""What `mrrope eval` and `mrrope report` say to those who ask for what cannot be, and where results go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrrope_gguf import verbs_eval
from mrrope_gguf.cli import _parsed, _parser, main
from mrrope_gguf.errors import FileTrouble
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.suite import NAME
from tests import tiny
from tests.eval_suite import prose

pytestmark = pytest.mark.engine


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text, which is the current one."""
    tiny.make(tmp_path / "m.gguf", n_layer=1, n_ctx=256)
    prose(tmp_path / "t.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run_verb(given: list[str]) -> int:
    return verbs_eval.run(_parsed(_parser(), given))


def words(*more: str, what: str = "ppl", methods: str = "none,yarn", text: str = "t.txt") -> list[str]:
    named = ["--text", text] if text and what in ("ppl", "kl", "ruler") else []
    return ["eval", what, "m.gguf", "--methods", methods, *named, "--lengths", "512", "-t", "1", "-fa", "off", *more]


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "elastic on a stock library": (
        words(methods="none,elastic"),
        ["elastic: needs the patched engine", "mrrope build"],
    ),
    "unknown method": (words(methods="none,yearn"), ["unknown method 'yearn'", "none, truncate, linear"]),
    "a scale that stretches nothing": (words("--scale", "1"), ["yarn", "needs a scale above 1"]),
    "a scale of nothing": (words("--scale", "0"), ["a scale of 0", "1 or more"]),
    "a scale that is no number": (
        ["eval", "ppl", "m.gguf", "--methods", "none", "--scale", "nan"],
        ["a scale of nan", "the model's 256 tokens"],
    ),
    "a scale without end": (["eval", "ppl", "m.gguf", "--methods", "none", "--scale", "inf"], ["a scale of inf"]),
    "a scale past all positions": (words("--scale", "1e9"), ["a scale of 1e+09", "2147483647"]),
    "no folder": (words("--out", ""), ["--out is empty"]),
    "a folder that is a file": (
        words("--out", "m.gguf"),
        ["m.gguf: results cannot be kept there", "m.gguf is no folder"],
    ),
    "a folder below a file": (words("--out", "t.txt/results"), ["t.txt is no folder", "--out with a folder"]),
    "a text too short": (
        words("--lengths", "8k"),
        ["t: the text is shorter", "8192 positions need 8193", "--lengths up"],
    ),
    "no text": (words(text="gone.txt"), ["gone.txt: no such text", "voyage-out", "mrrope texts"]),
    "a text twice": (words("--text", "./t.txt"), ["a second text of the name 't'"]),
    "no benchmark file": (words("--file", "kv.jsonl", what="retrieval"), ["kv.jsonl: no such file", "makers publish"]),
    "no model": (["eval", "ppl", "gone.gguf"], ["gone.gguf"]),
    "a length too short": (words("--lengths", "100"), ["a length of 100 tokens", "blocks of 256"]),
    "a model that does not fit": (words("--lengths", "2000m"), ["do not fit in memory", "KV cache"]),
    "a budget that is none": (words("--budget", "soon"), ["'soon' is no time", "--budget 30m"]),
    "a budget too small": (words("--budget", "0.01s"), ["a budget of 0 s is too small"]),
    "no samples": (words("--samples", "0", what="needle"), ["--samples 0"]),
    "too many keys": (words("--keys", "99", what="needle"), ["--keys 99", "1 to 10 keys"]),
    "a depth outside": (words("--depths", "50,101", what="needle"), ["--depths [50.0, 101.0]"]),
    "a text for needles": (words("--text", "t.txt", what="needle"), ["--text means nothing here", "--hay TEXT hides"]),
    "hay for losses": (words("--hay", "t.txt"), ["eval ppl: --hay means nothing here", "belongs to needle"]),
    "tasks for needles": (words("--tasks", "vt", what="needle"), ["--tasks means nothing", "ruler and retrieval"]),
    "depths of many keys": (words("--depths", "5", "--keys", "3", what="needle"), ["--depths means nothing beside"]),
    "tasks of no kind": (
        words("--tasks", "vt,nih", what="all"),
        ["nih: no such task", "core, offline, niah", "passkey"],
    ),
    "no threads": (words("-t", "0"), ["--threads 0"]),
    "no such task": (words("--tasks", "niah", what="ruler"), ["niah: no such task of RULER"]),
    "prose for an essay": (words("--tasks", "qa_1", what="ruler"), ["qa_1"]),
    "a prompt that cannot be": (words(what="retrieval"), ["does not fit in 512 tokens"]),
    "an engine that no file can tell": (words(methods="none,nope@B"), ["unknown method 'nope@B'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    given, reasons = REFUSED[case]
    assert main(given) == 1
    said = capsys.readouterr().err
    for reason in ("error: ", "  fix: ", *reasons):
        assert reason in said, said
    assert "Traceback" not in said
    assert not (here / "eval").exists()
    assert not (here / "cache" / "evals").exists()


@pytest.mark.parametrize(
    "given",
    [
        ["eval"],
        ["eval", "nothing", "m.gguf"],
        words("--lengths", "few"),
        words("--depths", "a"),
        words("-ctk", "q9"),
        words("--methods", ","),
        words("--lengths", ""),
    ],
)
def test_wrong_words_are_exit_2(here: Path, capsys: pytest.CaptureFixture[str], given: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the check beforehand did not see, such as a folder that went meanwhile."""
    monkeypatch.setattr(verbs_eval, "_check_out", lambda out: None)
    (here / "file").write_text("")
    with pytest.raises(FileTrouble, match="file/x: the folder of results cannot be made") as caught:
        run_verb(words("--out", "file/x"))
    assert caught.value.why == "Not a directory"


def test_a_report_that_cannot_be_written_says_where_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(methods="none")) == 0
    capsys.readouterr()
    (here / "eval" / "perplexity.png").unlink()
    (here / "eval" / "perplexity.png").mkdir()  # as good as a full disk, to those who write there
    assert main(["report", "eval"]) == 1
    said = capsys.readouterr().err
    assert "error: eval: the report cannot be written" in said
    assert "mrrope report DIR --out OTHER" in said
    assert main(["report", "eval", "--out", "other"]) == 0
    assert not list(here.glob("*/.mrrope-*"))


def test_an_empty_folder_has_no_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    for folder in ("empty", "gone"):
        assert main(["report", folder]) == 1
        said = capsys.readouterr().err
        assert "no results to report" in said
        assert "mrrope eval ... --out DIR" in said


def test_a_run_and_its_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--estimate")) == 0
    estimate = capsys.readouterr().err.splitlines()[-1]
    assert "5 cells in 3 passes" in estimate  # truncation's cell inside the window is none's
    assert not (here / "eval").exists()
    assert main(words()) == 0
    out, said = capsys.readouterr()
    assert "eval/report.html" in out.splitlines()[-1]
    assert said.splitlines()[-3:] == ["ppl t none", "ppl t truncate", "ppl t yarn"]
    found = read(here / "eval")
    assert (found.ways, found.skipped) == (["none", "truncate", "yarn"], 0)
    before = (here / "eval" / NAME).read_bytes()
    assert main(words("--json")) == 0
    out, said = capsys.readouterr()
    assert "all 6 cells are in eval already" in said
    assert json.loads(out)["ways"] == {"none": "", "truncate": "", "yarn": "A"}
    assert (here / "eval" / NAME).read_bytes() == before
    assert main(words("--scale", "8")) == 1
    assert "the scale was 4.0 and is 8.0" in capsys.readouterr().err


def test_names_of_others_do_not_command_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.txt").rename(here / "a\x1b[31mb.txt")
    assert main(words(text="a\x1b[31mb.txt", methods="none")) == 0
    out, said = capsys.readouterr()
    assert "\x1b" not in out + said
