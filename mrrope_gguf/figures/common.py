"""What every figure shares: the tables it is of, and how its picture and its numbers reach files."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from ..aside import written_aside
from ..errors import FileTrouble, MrropeError, Refused
from ..evals.ways import STATIC, Way, parse
from ..extend import method_table
from ..facts import RopeFacts, obstacle, read_facts
from ..gguf.source import Source
from ..tables import RopeTable, rope_table
from ..text import printable

KINDS = ("radix", "factors", "bound", "attention", "bands")
PICTURES = (".png", ".svg", ".pdf")
DATA = (".json", ".csv")
Row = Mapping[str, object]


class Figure(Protocol):
    """The numbers of one figure. `rows` is the long form that a CSV file holds."""

    def to_json(self) -> dict[str, object]: ...
    def rows(self) -> list[Row]: ...
    def render(self) -> str: ...
    def draw(self, path: Path) -> None: ...


def model_facts(path: str | os.PathLike[str]) -> RopeFacts:
    """A model's RoPE; an extended file's is that of its original.

    Raises BadFile, Refused or FileTrouble for a file without RoPE to stretch.
    """
    with Source.open(path) as source:
        facts = read_facts(source.index)
    name = printable(Path(path).name)
    if refusal := obstacle(facts, name):
        raise refusal
    if facts.mrrope is not None:
        raise Refused(
            f"{name}: no figure can be made of this extended file",
            why="its undo record is gone, so the model it was made from is not known",
            fix="name the original file",
        )
    return facts


def figure_ways(methods: str, scale: float) -> list[Way]:
    """`none` and static ways of one scale by their names, separated by commas. Raises Refused for any other name."""
    if not (isfinite(scale) and scale >= 1.0):
        raise Refused(
            f"a scale of {scale:g}", why="a context is stretched 1 time or more, and not without end", fix="--scale 4"
        )
    ways = parse(methods, scale)
    for way in ways:
        if way.name not in ("none", *STATIC):
            raise Refused(
                f"{way.name}: a figure is of single tables",
                why="this is a way to run a model that has more than one, or none of its own",
                fix=f"--methods takes none, {', '.join(STATIC)}",
            )
    return ways


def model_tables(path: str | os.PathLike[str], methods: str, scale: float) -> dict[str, RopeTable]:
    """{method: table} of a model at one scale; `none` is the model itself, scale 1. Raises as the two above do."""
    facts, name = model_facts(path), printable(Path(path).name)
    return {way.name: way_table(facts, name, way) for way in figure_ways(methods, scale)}


def way_table(facts: RopeFacts, name: str, way: Way, beta_fast: float = 32.0, beta_slow: float = 1.0) -> RopeTable:
    """The table of a way that figure_ways gave, with a band of its own. Raises Refused as `mrrope extend` does."""
    plain, scale = way.method == "none", way.scale or 1.0
    # none has the facts that a table of any scale would have
    t = method_table(facts, name, "yarn" if plain else way.method, 2.0 if plain else scale)
    return rope_table(
        way.method, n_rot=t.n_rot, freq_base=t.freq_base, n_ctx_orig=t.n_ctx_orig, scale=scale,
        beta_fast=beta_fast, beta_slow=beta_slow, base_factors=t.base_factors,
    )  # fmt: skip


def picture_paths(out: str | os.PathLike[str], kind: str) -> list[Path]:
    """Where --out puts pictures: the file it names, or NAME.png and NAME.svg in the folder it names, made if missing.

    Raises FileTrouble for a folder that cannot be made, and for another suffix.
    """
    path = Path(out)
    if path.suffix.lower() in PICTURES and not path.is_dir():
        _folder(path.parent)
        return [path]
    if path.suffix and not path.is_dir():
        raise FileTrouble(
            f"{printable(path.name)}: no picture has this suffix",
            why=f"'{printable(path.suffix)}' is none of {', '.join(PICTURES)}, and no folder of that name is there",
            fix="--out figure.png, --out figure.svg, or --out FOLDER for both",
        )
    _folder(path)
    return [path / f"figure-{kind}{suffix}" for suffix in PICTURES[:2]]


def check_data(path: str | os.PathLike[str]) -> Path:
    """The file that --data names. Raises FileTrouble unless it ends in .json or .csv and its folder is there."""
    file = Path(path)
    if file.suffix.lower() not in DATA:
        raise FileTrouble(
            f"{printable(file.name)}: numbers are written as JSON or CSV",
            why=f"its suffix is '{printable(file.suffix)}'",
            fix="--data numbers.json or --data numbers.csv",
        )
    _folder(file.parent)
    return file


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileTrouble(
            f"{printable(str(path))}: the folder cannot be made", why=error.strerror or str(error), fix="name another"
        ) from None


def write_picture(figure: Figure, path: Path) -> None:
    """Draw the figure into a file beside `path` and rename it, so that a picture that was there stays until then.

    The same numbers give the same bytes. Raises MrropeError without matplotlib, FileTrouble where it cannot be written.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MrropeError(
            "plots need matplotlib, which is not installed", why=str(error), fix="pip install 'mrrope-gguf[plot]'"
        ) from None
    # names are not formulas; words stay words in SVG; a PNG small enough for a page
    settings = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "mrrope", "savefig.dpi": 120}
    try:
        with written_aside(path) as aside, rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in letters that the font lacks
            figure.draw(aside)
            if aside.suffix.lower() == ".png":
                _few_colours(aside)
    except OSError as error:
        raise _unwritten(path, error) from None


def _few_colours(path: Path) -> None:
    """A PNG of 256 colours: lines look the same, and a page loads a third of the bytes."""
    from PIL import Image  # matplotlib needs it, so it is here

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def write_data(figure: Figure, path: Path) -> None:
    """The figure's numbers as JSON or CSV, by the suffix; the whole file or none. Raises FileTrouble."""
    rows = figure.rows()
    text = json.dumps(figure.to_json(), indent=1) + "\n" if path.suffix.lower() == ".json" else as_csv(rows)
    try:
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise _unwritten(path, error) from None


def as_csv(rows: Sequence[Row]) -> str:
    """Rows under the names of every column that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _unwritten(path: Path, error: OSError) -> FileTrouble:
    why = error.strerror or str(error)
    return FileTrouble(f"{printable(path.name)}: cannot be written", why=why, fix="choose another place for it")


def aligned(table: Sequence[Sequence[Any]]) -> str:
    """Lines of columns, the first to the left and the others to the right.

    >>> print(aligned([("way", "loss"), ("yarn", "2.5")]))
    way   loss
    yarn   2.5
    """
    cells = [[str(cell) for cell in row] for row in table]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    lines = ("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False)))
             for row in cells)  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
