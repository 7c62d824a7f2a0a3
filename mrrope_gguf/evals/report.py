"""`mrrope report`: a results file as a table for programs, a page for people and the pictures of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..aside import written_aside
from ..errors import FileTrouble, MrropeError
from .report_pages import html, markdown, numbers
from .report_pictures import draw
from .report_read import read
from .report_stats import Column, Summary, Table, Task, Versus, summarize
from .report_versus import against_truncate
from .report_words import Picture, blocks, effective, verdict


@dataclass(frozen=True)
class Report:
    """What was written. `missing`: why there are no pictures, empty where there are."""

    summary: Summary
    files: tuple[Path, ...]
    missing: str = ""

    def to_json(self) -> dict[str, object]:
        """The summary's numbers: perplexity tables in nats, intervals as [mean, low, high]."""
        s = self.summary
        tables = {"ppl": [_table(t) for t in s.ppl], "kl": [_table(t) for t in s.kl]}
        said = {"against_truncate": list(against_truncate(s))}
        tasks = {"ruler": [_task(t) for t in s.ruler], "tasks": [_task(t) for t in s.tasks]}
        facts = {"n_ctx_orig": s.results.n_ctx_orig, "ways": {way: s.results.mode(way) for way in s.results.ways}}
        lines = {"skipped_lines": s.results.skipped, "other_lines": dict(s.results.others)}
        return {
            "files": [str(path) for path in self.files],
            "bucket": s.bucket,
            **facts,
            **lines,
            **said,
            **tables,
            **tasks,
        }

    def render(self) -> str:
        """The files' paths, one a line: the page last."""
        return "\n".join(map(str, self.files))


def report(directory: str | Path, out: str | Path | None = None, *, bucket: int | None = None) -> Report:
    """Write results.csv, report.md, report.html and the pictures of `directory`/results.jsonl into `out`.

    out: `directory` itself if None; made where it is missing. bucket: positions in a column of perplexity.
    Without matplotlib everything but the pictures is written.
    Raises FileTrouble and BadFile as `report_read.read` does, FileTrouble if a file cannot be written.
    """
    summary = summarize(read(directory), bucket)
    to = Path(directory if out is None else out)
    pictures: list[Picture] = []
    missing = ""
    try:
        to.mkdir(parents=True, exist_ok=True)
        try:
            pictures = draw(summary, to)
        except FileTrouble as error:
            raise _unwritten(to, error.why) from None
        except MrropeError as error:
            missing = str(error)
        drawings = {p.name: (to / f"{p.name}.svg").read_text(encoding="utf-8") for p in pictures}
        content = blocks(summary, pictures)
        files = [
            _write(to / "results.csv", numbers(summary)),
            _write(to / "report.md", markdown(content)),
            _write(to / "report.html", html(content, drawings)),
        ]
    except OSError as error:
        raise _unwritten(to, error.strerror or str(error)) from None
    images = [to / f"{p.name}{suffix}" for p in pictures for suffix in (".png", ".svg")]
    return Report(summary, (*images, *files), missing)


def _unwritten(to: Path, why: str) -> FileTrouble:
    fix = "name another folder: `mrrope report DIR --out OTHER`"
    return FileTrouble(f"{to}: the report cannot be written", why=why, fix=fix)


def _write(path: Path, text: str) -> Path:
    """The whole file or none: a report that is open in a browser is replaced at once."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
    return path


def _task(task: Task) -> dict[str, object]:
    losses = {"losses": _table(task.losses)} if task.losses else {}
    longest = {e.way: {"length": e.length, "shown": effective(e, task)} for e in task.effective}
    return {**_table(task.table), **losses, "base": task.base, "gated": task.gated, "effective": longest}


def _table(table: Table) -> dict[str, object]:
    columns = [_column(table.kind, column) for column in table.columns]
    return {"kind": table.kind, "name": table.name, "text": table.text, "columns": columns}


def _column(kind: str, column: Column) -> dict[str, object]:
    values = {way: {"mean": v.mean, "n": v.n, "whole": v.whole} for way, v in column.values.items()}
    place = {"label": column.label, "start": column.start, "end": column.end}
    against = {"rivals": [_versus(v) for v in column.rivals], "truncate": [_versus(v) for v in column.truncate]}
    return {**place, "values": values, "best": list(column.best), **against, "words": verdict(kind, column)}


def _versus(versus: Versus) -> dict[str, object]:
    interval = list(versus.interval) if versus.interval else None
    return {"way": versus.way, "other": versus.other, "interval": interval, "real": versus.real}
