"""The command line against words and streams of every kind: no traceback, exit codes 0 to 2, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrrope_gguf.cli import main
from tests import tiny

POSIX = pytest.mark.skipif(os.name != "posix", reason="the shell's redirections are POSIX ones")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    "words",
    [
        ["tiny.gguf", "--scale", "4", "out.gguf"],
        ["--scale", "4", "tiny.gguf", "--static", "out.gguf"],
        ["-m", "tiny.gguf", "--scale", "4", "out.gguf"],
        ["--scale", "4", "--", "tiny.gguf", "out.gguf"],
    ],
)
def test_destination_may_stand_anywhere(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    assert main(["extend", *words]) == 0
    assert capsys.readouterr().out == "out.gguf\n"
    assert sorted(os.listdir()) == ["out.gguf", "tiny.gguf"]


@pytest.mark.parametrize(
    "words",
    [
        ["extend", "a.gguf", "--scale", "4", "b.gguf", "c.gguf"],
        ["extend", "a.gguf", "--scale", "4", "--no-such-flag"],
        ["extend", "a.gguf", "", "--scale", "4"],
        ["extend", "", "--scale", "4"],
        ["extend", "a.gguf", "--radix", "r.json", "--method", "ntk"],
        ["extend", "a.gguf", "--ctx", "inf"],
        ["extend", "a.gguf", "--ctx", "1e400"],
        ["extend", "a.gguf", "--ctx", "3000m"],
        ["fit", "a.gguf", "-c", "-3"],
        ["inspect", "a.gguf", "b.gguf"],
    ],
)
def test_wrong_words_are_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--beta-fast", "1e300"], ["--beta-slow", "1e-300"], ["--attn-factor", "1e300"], ["--attn-factor", "1e-46"]],
)
def test_numbers_a_file_cannot_hold_are_refused(
    model: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extend", str(model), "--scale", "4", *option]) == 1
    assert "float32" in capsys.readouterr().err
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize(
    "text",
    [
        '{"radix": [1,2,2,2,1,1,1,1], "scale": 1.0001}',
        '{"radix": [1e-60,2,2,2,1,1,1,1], "lead": 1e30}',
        '{"rope_scaling": {"long_factor": [1,1,2,2,4,4,4]}, "text_config": 3}',
    ],
)
@pytest.mark.parametrize("rendering", ["--portable", "--engine"])
def test_tables_that_cannot_be_are_refused(
    model: Path, text: str, rendering: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = model.with_name("r.json")
    table.write_text(text)
    assert main(["extend", str(model), "--scale", "4", "--radix", str(table), rendering]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(p.name for p in model.parent.iterdir()) == ["r.json", "tiny.gguf"]


def test_the_path_printed_for_a_split_model_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tiny.make(tmp_path / "m.gguf", split=3)
    assert main(["extend", str(first), str(tmp_path / "long.gguf"), "--scale", "4"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "long-00001-of-00003.gguf"
    assert (tmp_path / "long-00001-of-00003.gguf").is_file()


def test_in_place_with_a_destination_is_refused_even_by_dry_run(model: Path) -> None:
    assert main(["extend", str(model), "other.gguf", "--scale", "4", "--in-place", "--dry-run"]) == 1


def test_a_reexpressed_file_stays_portable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.make(tmp_path / "q.gguf", arch="qwen2")
    main(["extend", str(source), str(tmp_path / "p.gguf"), "--scale", "4", "--portable"])
    assert main(["extend", str(tmp_path / "p.gguf"), str(tmp_path / "p2.gguf"), "--scale", "2"]) == 0
    assert "portable: re-expressed from 'qwen2'" in capsys.readouterr().err.split("p2.gguf")[0].split("q.gguf")[-1]


def test_control_characters_in_names_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        source = tiny.make(tmp_path / "a\x1b[31m.gguf")
    except OSError:
        pytest.skip("this file system has no such names")
    for scale, code in (("4", 0), ("0", 1)):
        assert main(["extend", str(source), "--scale", scale]) == code
        assert "\x1b" not in capsys.readouterr().err


def _mrrope(redirect: str, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    start = "import sys; from mrrope_gguf.cli import main; sys.exit(main())"
    command = ["sh", "-c", f'"$0" -c "$@" {redirect}', sys.executable, start, *words]
    return subprocess.run(command, capture_output=True, env={**os.environ, **env}, check=False)


@POSIX
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams(model: Path, redirect: str) -> None:
    out = model.with_name("out.gguf")
    run = _mrrope(redirect, "extend", str(model), str(out), "--scale", "4")
    assert run.returncode == 0, run.stderr
    assert main(["revert", str(out)]) == 0
    assert out.read_bytes() == model.read_bytes()


@POSIX
@pytest.mark.parametrize("redirect", ["| true", "> /dev/full"])
def test_output_nobody_takes_is_no_traceback(model: Path, redirect: str) -> None:
    if "full" in redirect and not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    assert b"Traceback" not in _mrrope(redirect, "inspect", str(model)).stderr


@POSIX
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8:strict"])
def test_names_that_the_terminal_cannot_show(tmp_path: Path, encoding: str) -> None:
    try:
        model = tiny.make(tmp_path / os.fsdecode("模".encode() + b"\xff.gguf"))
    except OSError:
        pytest.skip("this file system has no such names")
    for words in (["inspect"], ["fit"], ["extend", "--scale", "4"]):
        run = _mrrope("", words[0], str(model), *words[1:], PYTHONIOENCODING=encoding)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", [".", "", "plot"])
def test_a_plot_is_written_where_it_is_asked_for_or_not_at_all(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(model.parent)
    assert main(["inspect", str(model), "--plot", name]) == 1
    assert "the plot cannot be written" in capsys.readouterr().err
    assert os.listdir() == ["tiny.gguf"]
