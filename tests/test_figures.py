"""The paper's figures that need no run: their numbers against golden ones, pictures in both formats, clear errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.cli import main
from mrrope_gguf.errors import FileTrouble, Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.figures.bound import bound
from mrrope_gguf.figures.common import as_csv, figure_ways, picture_paths
from mrrope_gguf.figures.factors import factors
from mrrope_gguf.figures.radix import digits, radix
from tests import engine_models, tiny

GOLDEN = Path(__file__).parent / "golden"
ALL = "none,linear,ntk,yarn,yarn-turns,mrrope-uni,mrrope-pro"
SVG, PNG = b"<?xml", b"\x89PNG\r\n\x1a\n"


def golden(name: str, model: str, scale: float) -> list[dict[str, Any]]:
    """The golden entries of one model and scale, for the usual band."""
    entries = json.loads((GOLDEN / f"{name}.json").read_text())
    usual = [e for e in entries if e.get("beta_fast", 32.0) == 32.0 and e.get("beta_slow", 1.0) == 1.0]
    return [e for e in usual if (e["model"], e["scale"]) == (model, scale)]


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A header with Llama 2's RoPE: n_rot 128, base 10,000, 4096 tokens."""
    return tiny.make(tmp_path_factory.mktemp("llama2") / "llama2.gguf", head_dim=128, n_ctx=4096, n_layer=1)


def test_factors_are_the_golden_ones(llama2: Path) -> None:
    found = factors(llama2, methods=ALL, scale=4)
    wanted = {e["method"]: e for e in golden("tables", "llama2-7b", 4.0)}
    for table in found.tables[1:]:
        entry = wanted[table.method]
        assert table.factor_values == pytest.approx(entry["factors"], rel=1e-12)
        assert (table.d_l, table.d_h) == (20, 46)
        assert table.attn_factor == pytest.approx(entry["attn_factor"])
    assert set(found.tables[0].factor_values) == {1.0}
    assert [row["mrrope-pro"] for row in found.rows()] == list(found.tables[-1].factor_values)
    assert [row["theta"] for row in found.rows()] == pytest.approx([1e4 ** (-i / 64) for i in range(64)])


@pytest.mark.parametrize("scale", [4.0, 16.0])
def test_bounds_are_the_golden_ones(llama2: Path, scale: float) -> None:
    found = bound(llama2, methods=ALL, scale=scale)
    wanted = {e["method"]: e["first_negative"] for e in golden("bounds", "llama2-7b", scale)}
    assert found.bounds == {name: wanted[name] for name in found.bounds}
    for name, curve in found.curves.items():
        assert curve.bound == found.bounds[name]  # the picture reaches past every bound
        negative = curve.m[curve.lowest < 0]
        assert negative[0] <= wanted[name]


def test_digits_write_the_position(llama2: Path) -> None:
    for at in (0, 1, 4095, 16383, 2**31 - 1):
        for w in radix(llama2, methods=ALL, at=at).written:
            places = radix(llama2, methods=ALL, at=at).places[w.method]
            assert sum(d * p for d, p in zip(w.digits, places, strict=True)) + w.rest == pytest.approx(w.position)
            assert 0 <= w.rest < places[0] * (1 + 1e-9)


def test_a_digit_stays_below_its_radix(llama2: Path) -> None:
    found = radix(llama2, methods=ALL, scale=16)
    for w in found.written:
        assert all(0 <= d < r for d, r in zip(w.digits, found.radices[w.method], strict=False))


def test_radices_are_those_of_the_model_times_lambda(llama2: Path) -> None:
    """Their product over the band is S; uni shares it evenly, pro gives each digit more than the one before."""
    found = radix(llama2, methods=ALL, scale=4).radices
    plain = 1e4 ** (2 / 128)
    assert found["none"] == pytest.approx([plain] * 63)
    assert found["linear"] == pytest.approx(found["none"])
    uni, pro = ([r / plain for r in found[name]] for name in ("mrrope-uni", "mrrope-pro"))
    assert uni[20:46] == pytest.approx([4 ** (1 / 26)] * 26)
    assert pro[20:46] == sorted(pro[20:46])
    assert len(set(pro[20:46])) == 26
    for each in (uni, pro):
        assert each[:20] + each[46:] == pytest.approx([1.0] * 37)


def test_a_longer_radix_brings_a_far_position_back(llama2: Path) -> None:
    """The last position of the extended context has the leading digit that the last trained one has; plainly, not."""
    found = radix(llama2, scale=4)
    leading = [max(i for i, d in enumerate(w.digits) if d) for w in found.written]
    assert [w.position for w in found.written] == [4095, *[16383] * 5]
    assert leading[0] == leading[2] == leading[3] == leading[4] == leading[5] < leading[1]


def test_decimal_digits() -> None:
    assert digits(907, [1.0, 10.0, 100.0]) == ((7, 0, 9), 0.0)
    assert digits(0, [1.0, 3.0]) == ((0, 0), 0.0)
    assert digits(9, [4.0, 8.0]) == ((0, 1), 1.0)


def test_an_extended_file_gives_the_figure_of_its_original(llama2: Path, tmp_path: Path) -> None:
    longer = extend(llama2, tmp_path / "longer.gguf", scale=2, method="ntk").path
    assert factors(longer).rows() == factors(llama2).rows()


@pytest.mark.parametrize("kind", ["radix", "factors", "bound"])
def test_the_command_prints_writes_and_draws(
    llama2: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    data = [tmp_path / f"{kind}.{suffix}" for suffix in ("json", "csv")]
    assert main(["figure", kind, str(llama2), "--out", str(tmp_path / "new"), "--data", str(data[0]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(data[0].read_text())
    assert (printed["figure"], printed["model"]) == (kind, "llama2.gguf")
    png, svg = (tmp_path / "new" / f"figure-{kind}.{suffix}" for suffix in ("png", "svg"))
    assert png.read_bytes().startswith(PNG)
    assert svg.read_bytes().startswith(SVG)
    assert "mrrope-pro" in svg.read_text()
    one = tmp_path / "one.svg"
    assert main(["figure", kind, "-m", str(llama2), "--out", str(one), "--data", str(data[1])]) == 0
    assert one.read_bytes().startswith(SVG)
    rows = list(csv.DictReader(data[1].read_text().splitlines()))
    assert len(rows) > 60
    assert "llama2.gguf" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*")) + list((tmp_path / "new").glob(".*"))


def test_without_out_nothing_is_written(llama2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "factors", str(llama2)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_scale_and_methods_are_heard(llama2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", "bound", str(llama2), "--methods", "mrrope-pro", "-s", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bounds"] == {"mrrope-pro": 14239}
    assert main(["figure", "radix", str(llama2), "--methods", "yarn", "--at", "1k", "--json"]) == 0
    positions = json.loads(capsys.readouterr().out)["positions"]
    assert [(p["method"], p["position"]) for p in positions] == [("yarn", 1024)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "rope"], "unknown method 'rope'"),
        (["--methods", "elastic"], "elastic: a figure is of single tables"),
        (["--methods", "yarn@B"], "yarn@B: a figure is of single tables"),
        (["--methods", ""], "no method was named"),
        (["--scale", "1"], "needs a scale above 1, and the scale is 1"),
        (["--scale", "0.5"], "a scale of 0.5"),
        (["--methods", "none", "--scale", "nan"], "a scale of nan"),
        (["--out", "picture.gif"], "picture.gif: no picture has this suffix"),
        (["--data", "numbers.txt"], "its suffix is '.txt'"),
        (["--needle"], "figure factors: --needle means nothing here\n  why: it belongs to bands"),
        (["--at", "5"], "--at means nothing here"),
        (["--layers", "0"], "--layers means nothing here"),
        (["--ctx-size", "5"], "it belongs to attention and bands"),
    ],
)
def test_errors(
    llama2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "factors", str(llama2), *arguments]) == 1
    out, err = capsys.readouterr()
    assert words in err
    assert "  fix: " in err
    assert (out, list(tmp_path.iterdir())) == ("", [])


def test_lists_that_are_none(llama2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["figure", "bands", str(llama2), "--beta-fast", "8,x"])
    assert stopped.value.code == 2
    assert "'8,x' is not a list of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["radix", "factors", "bound", "attention", "bands"])
def test_a_model_without_rope(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine_models.model(tmp_path, "gpt2")
    assert main(["figure", kind, str(path)]) == 1
    assert "this model has no RoPE ('gpt2')" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", "bands", str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path, llama2: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileTrouble, match="the folder cannot be made"):
        picture_paths(tmp_path / "file" / "deeper", "bound")
    (tmp_path / "taken.png").mkdir()
    assert main(["figure", "factors", str(llama2), "--out", str(tmp_path / "taken.png")]) == 0  # a folder's name
    assert (tmp_path / "taken.png" / "figure-factors.png").exists()


def test_a_place_that_is_taken_by_a_folder(tmp_path: Path, llama2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "figure-factors.png").mkdir()
    assert main(["figure", "factors", str(llama2), "--out", str(tmp_path)]) == 1
    assert "figure-factors.png: cannot be written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["figure-factors.png"]


def test_a_position_that_is_none(llama2: Path) -> None:
    with pytest.raises(Refused, match="-1 is no position"):
        radix(llama2, at=-1)


def test_ways_of_a_figure() -> None:
    assert [(w.name, w.scale) for w in figure_ways("none,yarn", 4)] == [("none", 1.0), ("yarn", 4.0)]


def test_csv_has_every_column() -> None:
    assert as_csv([{"a": 1}, {"a": 2, "b": "x,y"}]) == 'a,b\n1,\n2,"x,y"\n'
