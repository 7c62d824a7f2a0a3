"""The report's pictures: what may leave them, which colours, what a map's rows are, and nothing drawn upon anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.evals.report import report
from tests.eval_results import answer, head, ppl, write

STATIC = ("linear", "ntk", "yarn", "yarn-turns", "mrrope-uni", "mrrope-pro")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every figure by the name of its PNG file; none is written, which takes seconds each."""
    figure: Any = pytest.importorskip("matplotlib.figure").Figure
    seen: dict[str, Any] = {}

    def keep(self: Any, path: Path, **options: Any) -> None:
        seen[Path(path).stem] = self
        Path(path).write_text("<svg></svg>")

    monkeypatch.setattr(figure, "savefig", keep)
    return seen


def made(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    assert report(write(folder, [head(ways={}), *lines])).missing == ""


def lines_of(figure: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_a_text_that_gets_harder_stays_in_the_picture(tmp_path: Path, drawn: dict[str, Any]) -> None:
    """A way that was measured on the easy part alone says nothing about where the others break down."""
    long = [ppl("t", way, [3.0] * 8 + [3.7] * 8) for way in ("truncate", "mrrope-uni")]
    made(tmp_path, [ppl("t", "none", [3.0] * 4 + [8.0] * 12), ppl("t", "ntk", [3.0] * 8), *long])
    axes = drawn["perplexity"].axes[0]
    assert 2.718**3.7 < axes.get_ylim()[1] < 60
    assert [text.get_text() for text in axes.texts] == ["up to 2,981"]


def test_words_at_the_edge_stand_one_below_the_other(tmp_path: Path, drawn: dict[str, Any]) -> None:
    made(
        tmp_path, [ppl("t", way, [3.0] * 4 + [last] * 12) for way, last in (("none", 8.0), ("ntk", 8.1), ("yarn", 3.0))]
    )
    first, second = drawn["perplexity"].axes[0].texts
    assert first.xyann[1] - second.xyann[1] >= first.get_fontsize()


def test_a_way_has_one_colour_in_all_pictures_of_all_reports(tmp_path: Path, drawn: dict[str, Any]) -> None:
    colours: dict[str, set[str]] = {}
    for i, ways in enumerate(
        (("truncate", *STATIC, "elastic", "none"), ("elastic", "yarn"), ("mrrope-pro", "truncate"))
    ):
        tasks = [answer("needle", way, n, "0", 1.0) for way in ways for n in (512, 2048)]
        made(tmp_path / str(i), [*(ppl("t", way, [3.0] * 16) for way in ways), *tasks])
        for name in ("perplexity", "scores-0"):
            for label, line in lines_of(drawn.pop(name)).items():
                colours.setdefault(label.partition(" (")[0], set()).add(line.get_color())
    assert all(len(its) == 1 for its in colours.values())
    assert len({colour for its in colours.values() for colour in its}) == len(colours) == 10  # and the rule's grey


def test_many_names_stand_beside_the_picture(tmp_path: Path, drawn: dict[str, Any]) -> None:
    for ways, beside in ((STATIC[:2], False), (STATIC, True)):
        made(tmp_path / str(beside), [answer("needle", way, n, "0", 1.0) for way in ways for n in (512, 2048)])
        figure = drawn["scores-0"]
        figure.draw_without_rendering()
        axes = figure.axes[0]
        legend = axes.get_legend()
        assert bool(legend.get_window_extent().x0 > axes.get_window_extent().x1) is beside
        assert {text.get_text() for text in legend.get_texts()} == {f"{way} (A)" for way in ways} | {
            "original context, 1024"
        }


def test_scores_of_a_length_that_is_not_finished_are_not_drawn(tmp_path: Path, drawn: dict[str, Any]) -> None:
    asked = [("yarn", 512, 4), ("none", 512, 4), ("yarn", 2048, 4), ("none", 2048, 3)]
    made(tmp_path, [answer("needle", way, n, str(i), 1.0) for way, n, m in asked for i in range(m)])
    found = lines_of(drawn["scores-0"])
    assert [list(found[way].get_xdata()) for way in ("yarn (A)", "none")] == [[512, 2048], [512]]


def test_one_length_needs_no_line(tmp_path: Path, drawn: dict[str, Any]) -> None:
    made(tmp_path, [answer("needle", way, 2048, "0", 1.0) for way in ("none", "yarn")])
    assert not drawn


def test_depths_that_are_no_grid_are_put_together_by_tenths(tmp_path: Path, drawn: dict[str, Any]) -> None:
    """Needles at random places, as RULER's are: a row for each of them would be a row of one cell."""
    made(
        tmp_path,
        [
            answer("niah", "yarn", n, str(i), float(i % 4 < 2), depth=min(2.51 * i + n / 4096, 100))
            for n in (512, 2048) for i in range(40)
        ],
    )  # fmt: skip
    axes = drawn["map-0"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(10 * i + 5) for i in range(10)]
    assert axes.collections[0].get_array().tolist() == [[0.5] * 2] * 10
    made(tmp_path / "grid", [answer("niah", "yarn", 512, str(d), 1.0, depth=d) for d in range(0, 105, 5)])
    assert len(drawn["map-0"].axes[0].get_yticklabels()) == 21
