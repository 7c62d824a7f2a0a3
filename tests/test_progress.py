"""The progress bar: one line however narrow the terminal, and nothing where there is none."""

from __future__ import annotations

import pytest

from mrrope_gguf.progress import Bar


@pytest.mark.parametrize("columns", [10, 20, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("done", [0, 1, 4096, 12287])
def test_the_line_never_wraps(columns: int, done: int) -> None:
    line = Bar("original, article", ("tok", 1)).line(done, 12287, 15.0, columns)
    assert len(line) <= columns
    assert "\n" not in line


def test_says_how_far_how_fast_and_how_long_still() -> None:
    line = Bar("copying", ("MB", 1e6)).line(25_000_000, 100_000_000, 0.5)
    assert all(part in line for part in ("copying", "25%", "25/100 MB", "50 MB/s", "2 s left"))


def test_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("copying", ("MB", 1e6)) as bar:
        bar(1, 2)
        bar(2, 2)
    assert capsys.readouterr() == ("", "")
