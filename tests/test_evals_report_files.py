"""What `mrrope report` writes: a page that loads nothing and runs nothing, Markdown, CSV and pictures."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mrrope_gguf.cli import main
from mrrope_gguf.evals.report import report
from mrrope_gguf.evals.report_pages import inline
from tests.eval_results import DEPTHS, LENGTHS, WAYS, answer, head, losses, ppl, whole, write

NAMES = ("perplexity", "perplexity-1", "perplexity-2", "perplexity-3", "differences", "scores-0", "map-0", "scores-1")
VOID = ("meta", "br")


class Page(HTMLParser):
    """Tags, attributes, the text of each tag, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    directory = write(tmp_path_factory.mktemp("results"), whole(), '{"run": "cut')
    to = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert report(directory, to).missing == ""
    assert [p.name for p in directory.iterdir()] == ["results.jsonl"]
    return to


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_every_file_is_written(out: Path) -> None:
    pictures = {f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == pictures | {"results.csv", "report.md", "report.html"}
    for name in NAMES:
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        ElementTree.parse(out / f"{name}.svg")


def test_the_page_loads_and_runs_nothing(page: Page) -> None:
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "image", "object", "base"})
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith("#"), (tag, value)
            assert "//" not in (value or ""), (tag, name, value)
            assert not re.search(r"url\((?!#)", value or "")
    (style,) = page.words["style"][:1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_a_model_said_is_text(page: Page, out: Path) -> None:
    shown = "\\e[31m</td><script>alert(1)</script>![x](http://evil.example/x.png)|`$\\frac$"
    assert shown in page.words["td"]
    for name in ("report.html", "report.md", "results.csv"):
        assert "\x1b" not in (out / name).read_text(encoding="utf-8")
    text = (out / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "evil" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert "\\<script\\>" in row
    assert "\\!\\[x\\](http\\://" in row
    assert "<" not in re.sub(r"\\<", "", text)


def test_names_are_text_too_in_page_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "../<i>模$\\frac$ =1|\x1b]0;x\x07"
    lines = [ppl(name, way, losses(0, "yarn")) for way in ("none", "truncate", "_<b>\x1b")]
    tasks = [answer(name, "_<b>\x1b", 512, f"{d}", 1.0, depth=d) for d in (0, 50)]
    model = {"name": "<script>", "n_ctx_orig": 1024}
    directory = write(tmp_path / "r", [head(model=model), *lines, *tasks])
    assert report(directory).missing == ""
    page = Page((directory / "report.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {"i", "b"} & {tag for tag, _ in page.tags}
    assert "Evaluation of <script>" in page.words["h1"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    svg = (directory / "perplexity.svg").read_text(encoding="utf-8")
    for picture in directory.glob("*.svg"):
        ElementTree.parse(picture)
    assert "&lt;i&gt;模$\\frac$ =1|" in svg


def test_both_colour_schemes(page: Page) -> None:
    style = page.words["style"][0]
    assert "color-scheme: light dark" in style
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = {name for _, a in page.tags for name in re.findall(r"var\((--\w+)\)", a.get("style") or "")}
    assert {"--ink", "--page", "--c0"} <= used
    assert used <= set(re.findall(r"(--\w+):", light))
    assert used <= set(re.findall(r"(--\w+):", dark))


def test_tables_are_read_aloud_well(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == tags.count("thead") > 10
    assert {a.get("scope") for tag, a in page.tags if tag == "th"} == {"col", "row"}
    figures = [a for tag, a in page.tags if tag == "figure"]
    assert len(figures) == len(NAMES) == tags.count("svg")
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert next(a["lang"] for tag, a in page.tags if tag == "html") == "en"


def test_ids_in_the_page_are_its_own(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 50
    for _, a in page.tags:
        for name, value in a.items():
            for wanted in re.findall(r"url\(#([^)]+)\)", value or "") + (
                [value[1:]] if "href" in name and value else []
            ):
                assert wanted in ids


def test_inline_keeps_the_map_colours_and_paints_the_rest() -> None:
    path = '<path style="fill: #ffffff; stroke: #0cd79f"/>'
    svg = f'<?xml version="1.0"?>\n<svg xmlns="http://a" id="f"><metadata>x</metadata>{path}</svg>'
    assert inline(svg, "n") == '<svg id="n-f"><path style="fill: var(--page); stroke: #0cd79f"/></svg>'


def test_csv_holds_every_number(out: Path) -> None:
    with open(out / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)

    def one(**wanted: str) -> dict[str, str]:
        (row,) = [r for r in rows if wanted.items() <= r.items()]
        return row

    for way in WAYS:
        row = one(measure="ppl", text="two", way=way, column="1K-2K", metric="perplexity")
        assert float(row["value"]) == pytest.approx(exp(np.mean(losses(1, way)[4:8])), rel=1e-12)
        assert (row["start"], row["end"], row["n"], row["whole"]) == ("1024", "2048", "4", "1")
    row = one(measure="ppl", text="all texts", way="truncate", other="yarn", column="past the window")
    assert float(row["value"]) == pytest.approx(0.08)
    assert float(row["low"]) < 0.08 < float(row["high"])
    assert row["real"] == "1"
    cells = [r for r in rows if r["measure"] == "needle" and r["metric"] == "score by depth"]
    assert len(cells) == len(WAYS) * len(LENGTHS) * len(DEPTHS)
    assert one(measure="needle", way="yarn", column="4096", depth="50.0", metric="score by depth")["value"] == "0.0"
    assert one(measure="needle", way="elastic", column="4K", metric="score")["mode"] == "C"


def test_markdown_marks_the_best_and_links_the_pictures(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| truncate \|  \| \*\*14\.06\*\* \| 19\.52 \|", text)
    assert re.search(r"\| yarn \| A \| 14\.35 \| \*\*18\.02\*\* \|", text)
    linked = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert sorted(linked) == sorted(f"{name}.png" for name in NAMES)


def test_the_same_results_give_the_same_files(out: Path, tmp_path: Path) -> None:
    report(write(tmp_path, whole(), '{"run": "cut'))
    for name in ("report.html", "report.md", "results.csv", "map-0.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write(tmp_path / "a", [head(), answer("needle", "none", 512, "0", 1.0)], "{")
    assert main(["report", str(directory), "--out", str(tmp_path / "b"), "--json"]) == 0
    printed, err = capsys.readouterr()
    found = json.loads(printed)
    assert found["tasks"][0]["columns"][0]["values"]["none"] == {"mean": 1.0, "n": 1, "whole": True}
    assert (found["n_ctx_orig"], found["skipped_lines"]) == (1024, 1)
    assert all(Path(path).is_file() for path in found["files"])
    assert "left out" in err
    assert main(["report", str(directory)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(directory / "report.html")


def test_errors_are_three_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", [head(), answer("needle", "none", 512, "0", 1.0)])
    (tmp_path / "file").write_text("")
    for words in ([str(tmp_path)], [str(tmp_path / "missing")], [str(good), "--out", str(tmp_path / "file")]):
        assert main(["report", *words]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line[:7] for line in lines] == ["error: ", "  why: ", "  fix: "]
    assert main(["report", str(good), "--bucket", "0"]) == 1
    assert not list(tmp_path.glob("good/report*"))


def test_without_matplotlib_all_but_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    directory = write(tmp_path, [head(), *(ppl("t", way, losses(0, way)) for way in WAYS)])
    assert main(["report", str(directory)]) == 0
    assert "plots need matplotlib" in capsys.readouterr().err
    names = {p.name for p in directory.iterdir()}
    assert names == {"results.jsonl", "results.csv", "report.md", "report.html"}
    assert "<svg" not in (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved from here on, by the names of their files."""
    figure: Any = pytest.importorskip("matplotlib.figure").Figure
    drawn: dict[str, Any] = {}
    save = figure.savefig

    def keep(self: Any, path: Path, **options: Any) -> None:
        drawn[Path(path).stem] = self
        save(self, path, **options)

    monkeypatch.setattr(figure, "savefig", keep)
    return drawn


def test_pictures(tmp_path: Path, drawn: dict[str, Any]) -> None:
    """Colours stay with their way; the map has depth 0 on top, a scale from 0 to 1 and the line after 1K."""
    report(write(tmp_path, whole()))
    (lines,) = ({line.get_label(): line for line in drawn["perplexity"].axes[0].lines} for _ in "1")
    assert list(lines["none"].get_xdata()) == [256, 1024, 1024, 2048, 2048, 3072, 3072, 4096]
    assert drawn["perplexity"].axes[0].get_xscale() == "log"
    assert any(text.get_text().startswith("up to 3") for text in drawn["perplexity"].axes[0].texts)
    bars = {bar.get_label(): bar for bar in drawn["differences"].axes[0].containers}
    assert set(bars) == {"yarn (A)", "mrrope-uni (A)", "elastic (C)"}
    assert "not shown" not in drawn["differences"].axes[0].get_title(loc="left")
    scores = {line.get_label(): line for line in drawn["scores-0"].axes[0].lines}
    for label in bars:
        assert bars[label][0].get_color() == lines[label].get_color() == scores[label].get_color()
    yarn = drawn["map-0"].axes[2]
    assert yarn.get_title(loc="left") == "yarn (A)"
    assert np.array_equal(yarn.collections[0].get_array()[:, 3], [0, 0, 0, 1, 1])
    assert yarn.collections[0].get_clim() == (0, 1)
    assert yarn.get_ylim() == (5, 0)
    assert list(yarn.lines[0].get_xdata()) == [2, 2]
    colours = [yarn.collections[0].cmap(x) for x in (0.0, 1.0)]
    assert np.allclose(colours, [[0xF0 / 255, 0x49 / 255, 0x6E / 255, 1], [0x0C / 255, 0xD7 / 255, 0x9F / 255, 1]])


def test_a_way_of_no_use_is_named_and_not_drawn_among_differences(tmp_path: Path, drawn: dict[str, Any]) -> None:
    lines = whole()
    for line in lines:
        if line.get("task") == "ppl" and line["way"] == "yarn":
            line["blocks"] = [loss + 3 for loss in line["blocks"]]
    report(write(tmp_path, lines))
    axes = drawn["differences"].axes[0]
    shown = {bar.get_label() for bar in axes.containers}
    assert shown == {"mrrope-uni (A)", "elastic (C)"}
    assert "(not shown: yarn (A), " in axes.get_title(loc="left")
