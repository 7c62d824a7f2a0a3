"""The command line: exit codes, what goes to stdout and what to stderr, and errors in three lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrrope_gguf.cli import main
from tests import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "tiny.gguf")


def test_extend_prints_the_path_on_stdout_and_talks_on_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend", str(model), "--scale", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(model.with_name("tiny-ContextLength256.gguf"))
    assert "64 tokens -> 256" in err
    assert "portable" in err


@pytest.mark.parametrize("verb", ["extend", "revert"])
def test_model_by_flag_leaves_the_positional_to_the_destination(
    model: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model
    options = ["--scale", "4"]
    if verb == "revert":
        source, options = tmp_path / "long.gguf", []
        main(["extend", str(model), str(source), "--scale", "4"])
    assert main([verb, "-m", str(source), str(tmp_path / "out.gguf"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out.gguf")


def test_dry_run_says_what_would_be_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extend", str(model), "--ctx", "1k", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "would write" in err
    assert "llama.context_length" in err


def test_in_place_and_back(model: Path) -> None:
    before = model.read_bytes()
    assert main(["extend", str(model), "--scale", "2", "--in-place"]) == 0
    assert model.read_bytes() != before
    assert main(["revert", str(model)]) == 0
    assert model.read_bytes() == before


@pytest.mark.parametrize("verb", ["inspect", "fit"])
def test_json(model: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["inspect", "fit"])
def test_text(model: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(model)]) == 0
    assert "tiny.gguf" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["extend", "revert", "inspect", "fit"])
def test_missing_file_is_one_error_and_exit_1(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(tmp_path / "none.gguf")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert "none.gguf: " in lines[0]
    assert [line[:7] for line in lines[1:]] == ["  why: ", "  fix: "]


@pytest.mark.parametrize("verb", ["extend", "revert", "inspect", "fit"])
def test_rubbish_is_one_error_and_exit_1(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    assert main([verb, str(tmp_path / "bad.gguf")]) == 1
    assert capsys.readouterr().err.startswith("error: bad.gguf: ")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["extend"],
        ["extend", "a.gguf", "--scale", "4", "--ctx", "8k"],
        ["extend", "a.gguf", "--portable", "--engine"],
        ["extend", "a.gguf", "--ctx", "many"],
        ["inspect", "a.gguf", "-m", "b.gguf"],
        ["fit", "a.gguf", "-ctk", "q9_0"],
    ],
)
def test_wrong_usage_is_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    capsys.readouterr()


def test_ctrl_c_is_130(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mrrope_gguf.verbs.inspect", interrupt)
    assert main(["inspect", str(model)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRROPE_DEBUG", "1")
    with pytest.raises(Exception, match=r"none\.gguf"):
        main(["inspect", str(tmp_path / "none.gguf")])
