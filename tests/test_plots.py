"""Plots: the right data drawn and labelled, files written, and clear errors without matplotlib or a place to write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.bound import bound_curve
from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.plots import (
    plot_bound,
    plot_factors,
    plot_intervals,
    plot_maps,
    plot_needles,
    plot_perplexity,
    plot_scores,
    plot_tradeoff,
)
from mrrope_gguf.tables import RopeTable, rope_table

FACTS: dict[str, Any] = {"n_rot": 64, "freq_base": 1e5, "n_ctx_orig": 8192}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is saved; the file is written all the same."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    seen: list[Any] = []
    save = figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(self.axes[0])
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", keep)
    return seen


def table(method: str, scale: float = 4.0) -> RopeTable:
    return rope_table(method, scale=scale, **FACTS)


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in [*axes.texts, *axes.get_legend().get_texts()]]


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_factors(drawn: list[Any], tmp_path: Path) -> None:
    tables = [table(m) for m in ("linear", "ntk", "yarn", "mrrope-uni", "mrrope-pro")]
    plot_factors(tables, tmp_path / "f.png")
    assert is_png(tmp_path / "f.png")
    axes = drawn[0]
    for t, line in zip(tables, axes.lines[-5:], strict=True):
        assert tuple(line.get_ydata()) == t.factor_values
    assert {"d_l = 10", "d_h = 20", "mrrope-pro, S = 4"} <= set(words(axes))
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert "n_rot 64, base 100000, 8192 tokens" in axes.get_title(loc="left")
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == (pytest.approx(10), pytest.approx(20))


def test_factors_of_different_models_shade_each_band(drawn: list[Any], tmp_path: Path) -> None:
    other = rope_table("yarn", n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=8)
    plot_factors([table("yarn"), other], tmp_path / "f.png")
    assert {"d_l = 10", "d_l = 20", "d_h = 46"} <= set(words(drawn[0]))
    assert "n_rot" not in drawn[0].get_title(loc="left")


def test_factors_whose_band_ends_past_the_last_pair(drawn: list[Any], tmp_path: Path) -> None:
    plot_factors([rope_table("yarn", n_rot=16, freq_base=1e4, n_ctx_orig=2**18, scale=8)], tmp_path / "f.png")
    assert "d_l = 6" in words(drawn[0])
    assert not any("d_h" in word for word in words(drawn[0]))
    plot_factors([table("none", 1.0)], tmp_path / "one.png")
    assert is_png(tmp_path / "one.png")


def test_perplexity(drawn: list[Any], tmp_path: Path) -> None:
    positions = np.arange(512, 24576, 1024)
    original = np.where(positions < 8192, 19.0, 29.0)
    plot_perplexity({"original": (positions, original), "extended": (positions, [20.0] * 24)}, 8192, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
    axes = drawn[0]
    assert list(axes.lines[0].get_ydata()) == list(original)
    assert {"original context, 8192", "original", "extended"} <= set(words(axes))
    assert axes.get_xscale() == "linear"
    assert axes.lines[2].get_xdata()[0] == 8192
    assert axes.get_ylim()[1] > 29


def test_perplexity_that_explodes_is_cut_and_says_so(drawn: list[Any], tmp_path: Path) -> None:
    x = [2**k for k in range(8, 18)]
    plot_perplexity(
        {"none": (x, [20.0] * 6 + [50.0, 400.0, 3000.0, 9000.0]), "pro": (x, [20.0] * 10)}, 8192, tmp_path / "p.png"
    )
    axes = drawn[0]
    assert axes.get_ylim()[1] == 50.0
    assert "up to 9,000" in words(axes)
    assert axes.get_xscale() == "log"


def test_positions_of_less_than_two_octaves_have_more_than_one_number(drawn: list[Any], tmp_path: Path) -> None:
    plot_perplexity({"a": ([34816, 38912], [36.0, 63.0])}, 32768, tmp_path / "p.png", log2=True)
    axes = drawn[0]
    low, high = axes.get_xlim()
    shown = [label.get_text() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
             if low <= at <= high]  # fmt: skip
    assert shown == ["32K", "33K", "34K", "35K", "36K", "37K", "38K"]


def test_perplexity_of_one_short_bucket(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_perplexity({"one": ([1], [5.0])}, 8192, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")


def test_bound_curves(drawn: list[Any], tmp_path: Path) -> None:
    curves = {
        m: bound_curve(rope_table(m, n_rot=128, freq_base=1e4, n_ctx_orig=4096, scale=4), 5000)
        for m in ("none", "mrrope-pro")
    }
    plot_bound(curves, tmp_path / "b.svg", n_ctx_orig=4096)
    assert (tmp_path / "b.svg").read_text().startswith("<?xml")
    assert "none: first negative at 1707" in words(drawn[0])
    assert "original context, 4096" in words(drawn[0])
    assert any(word.startswith("mrrope-pro: no bound to 4") for word in words(drawn[0]))


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1, 2], [3.0])}])
def test_nothing_to_draw(series: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs"):
        plot_perplexity(series, 8192, tmp_path / "p.png")
    with pytest.raises(ValueError, match="needs"):
        plot_factors([], tmp_path / "p.png")
    with pytest.raises(ValueError, match="needs"):
        plot_bound({}, tmp_path / "p.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MrropeError, match="matplotlib, which is not installed") as caught:
        plot_factors([table("yarn")], tmp_path / "f.png")
    assert caught.value.fix == "pip install 'mrrope-gguf[plot]'"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FileTrouble, match=r"f\.png: the plot cannot be written"):
        plot_factors([table("yarn")], tmp_path / "missing" / "f.png")


def test_a_suffix_matplotlib_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(MrropeError, match=r"f\.plot: the plot cannot be written"):
        plot_factors([table("yarn")], tmp_path / "f.plot")


def test_needles(drawn: list[Any], tmp_path: Path) -> None:
    series = {"static": ([6144, 12288, 24576], [0.3, 0.5, 0.9]), "elastic": ([6144, 24576], [0.2, 0.4])}
    plot_needles(series, 8192, tmp_path / "n.png")
    assert is_png(tmp_path / "n.png")
    lines = {line.get_label(): line for line in drawn[0].lines}
    for name, (x, y) in series.items():
        assert list(lines[name].get_xdata()) == x
        assert list(lines[name].get_ydata()) == y
    assert drawn[0].get_ylim()[0] == 0
    assert "original context, 8192" in words(drawn[0])
    with pytest.raises(ValueError, match="as many lengths"):
        plot_needles({"a": ([1], [])}, 8192, tmp_path / "n.png")


def test_intervals_are_per_cent_of_perplexity_side_by_side(drawn: list[Any], tmp_path: Path) -> None:
    point = (np.log(0.9), np.log(0.8), np.log(1.05))
    plot_intervals({"uni": {10240: point, 14336: point}, "pro": {10240: point}}, 8192, tmp_path / "i.png")
    assert is_png(tmp_path / "i.png")
    uni, pro = drawn[0].containers
    assert [c.get_label() for c in (uni, pro)] == ["uni", "pro"]
    assert uni[0].get_ydata() == pytest.approx([-10, -10])
    (first, _) = uni[2][0].get_segments()
    assert first[:, 1] == pytest.approx([-20, 5])
    assert uni[0].get_xdata()[0] < 10240 < pro[0].get_xdata()[0]
    with pytest.raises(ValueError, match="one point"):
        plot_intervals({"a": {}}, 8192, tmp_path / "i.png")


def test_tradeoff(drawn: list[Any], tmp_path: Path) -> None:
    plot_tradeoff({"a": (20.0, 0.5), "b": (19.0, 0.9)}, 12288, tmp_path / "t.png")
    assert is_png(tmp_path / "t.png")
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in drawn[0].lines] == [
        (20, 0.5),
        (19, 0.9),
    ]
    assert "12K" in drawn[0].get_ylabel()
    with pytest.raises(ValueError, match="one point"):
        plot_tradeoff({}, 12288, tmp_path / "t.png")


def test_scores(drawn: list[Any], tmp_path: Path) -> None:
    series = {"b": ([4096, 8192], [1.0, 0.5]), "c": ([4096], [0.25])}
    plot_scores(series, None, tmp_path / "s.png", title="Scores", among=["a", "b", "c"])
    plot_scores({"a": ([4096], [0.5]), **series}, 4096, tmp_path / "all.png", title="Scores")
    alone, beside = ({line.get_label(): line for line in axes.lines} for axes in drawn)
    assert list(alone["b"].get_ydata()) == [1.0, 0.5]
    assert [alone[name].get_color() for name in "bc"] == [beside[name].get_color() for name in "bc"]
    assert drawn[0].get_ylim()[1] > 1
    assert drawn[0].get_title(loc="left") == "Scores"
    assert words(drawn[0]) == ["b", "c"]
    assert "original context, 4096" in words(drawn[1])
    with pytest.raises(ValueError, match="as many lengths"):
        plot_scores({"a": ([1], [])}, None, tmp_path / "s.png", title="")


def test_maps_leave_what_was_not_measured_empty(drawn: list[Any], tmp_path: Path) -> None:
    maps = {"a": {(4096, 0.0): 1.0, (8192, 50.0): 0.25}, "b": {(4096, 50.0): 0.5}}
    plot_maps(maps, 2048, tmp_path / "m.png", title="Map")
    assert is_png(tmp_path / "m.png")
    cells = drawn[0].collections[0].get_array()
    assert cells[0, 0] == 1
    assert cells[1, 1] == 0.25
    assert np.ma.getmaskarray(cells).tolist() == [[False, True], [True, False]]
    assert list(drawn[0].lines[0].get_xdata()) == [0, 0]  # every length is past the context
    plot_maps(maps, None, tmp_path / "m.svg", title="Map")
    assert not drawn[1].lines
    assert "<image" not in (tmp_path / "m.svg").read_text()
    with pytest.raises(ValueError, match="one cell"):
        plot_maps({"a": {}}, None, tmp_path / "m.png", title="")
