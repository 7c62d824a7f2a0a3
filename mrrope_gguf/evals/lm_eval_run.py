"""lm-evaluation-harness in this process: tasks by name, its table, its results in a folder; stopped runs go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..aside import written_aside
from ..errors import FileTrouble, MrropeError, Refused
from ..text import printable

if TYPE_CHECKING:
    from .lm_eval import MrropeLM

Say = Callable[[str], object]
Results = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The harness's results as simple_evaluate returns them, and the files they were written to."""

    results: Results
    files: tuple[Path, ...] = ()

    def render(self) -> str:
        """The harness's own tables."""
        from lm_eval.utils import make_table

        columns = ("results", "groups") if self.results.get("groups") else ("results",)
        tables = "\n".join(make_table(self.results, column) for column in columns)
        return "\n".join(printable(line, limit=1000) for line in tables.splitlines())


def evaluate(
    model: str | os.PathLike[str], tasks: Sequence[str], *, include_path: str | os.PathLike[str] | None = None,
    limit: float | None = None, num_fewshot: int | None = None, apply_chat_template: bool = False,
    gen_kwargs: str | None = None, out: str | os.PathLike[str] | None = None, include_defaults: bool = True,
    say: Say | None = None, **how: Any,
) -> Evaluated:  # fmt: skip
    """Run `tasks` on a GGUF file; `how` is what MrropeLM takes.

    tasks: names or patterns of the harness's own tasks and of those in the folder include_path. limit: documents of
    each task, or a share of them below 1. num_fewshot: examples, where the task does not insist on a number.
    include_defaults=False leaves the harness's own tasks out, and with them the seconds it takes to list them.
    out: a folder for results_TIME.json and samples_TASK_TIME.jsonl, which the same call goes on in where it was
    stopped: each answer is kept there at once, under a hash of model, engine and way.

    Raises MrropeError for what is missing or unknown, before any work, and for what goes wrong inside the harness.
    """
    from .lm_eval import MrropeLM, require_lm_eval

    require_lm_eval()
    folder = _folder(out)
    manager, names = _tasks(tasks, include_path, include_defaults)
    with MrropeLM(model, say=say, **how) as lm:
        if apply_chat_template:
            lm.chat_template(True)
        results = _simple_evaluate(
            lm, names, manager, folder, limit=limit, num_fewshot=num_fewshot, apply_chat_template=apply_chat_template,
            gen_kwargs=gen_kwargs,
        )  # fmt: skip
        if say:
            say(f"{printable(lm.name)}: {lm.decoded} tokens decoded")
    return Evaluated(results, _write(folder, results) if folder else ())


def _folder(out: str | os.PathLike[str] | None) -> Path | None:
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileTrouble(
            f"{printable(str(out))}: no place for results", why=str(error), fix="name a folder that can be made"
        ) from error
    return Path(out)


def _tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None, defaults: bool) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names that match."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise FileTrouble(
            f"{printable(str(include_path))}: no tasks in there",
            why="it is not a folder",
            fix="name the folder that holds your tasks' YAML files",
        )
    own = None if include_path is None else str(include_path)
    manager = _guarded(lambda: TaskManager(include_path=own, include_defaults=defaults))
    found = {task: manager.match_tasks([task]) for task in tasks}
    unknown = [task for task, names in found.items() if not names]
    if unknown or not found:
        where = f" and those in {printable(str(include_path))}" if include_path else ""
        raise Refused(
            f"unknown tasks: {printable(', '.join(unknown))}" if unknown else "no task was named",
            why=f"{len(manager.all_tasks)} are known, the harness's{where}, and none is of that name",
            fix="`lm-eval ls tasks` lists them; --include-path DIR adds your own",
        )
    return manager, list(dict.fromkeys(name for names in found.values() for name in names))


def _simple_evaluate(lm: MrropeLM, names: list[str], manager: Any, folder: Path | None, **how: Any) -> Results:
    from lm_eval import simple_evaluate

    cache = str(folder / f"answers-{_identity(lm.get_model_info())}") if folder else None
    found = _guarded(
        lambda: simple_evaluate(model=lm, tasks=names, task_manager=manager, use_cache=cache, log_samples=True, **how)
    )
    return dict(found)


def _identity(info: Mapping[str, object]) -> str:
    """What answers are kept under, so that another model or way never takes them for its own."""
    return hashlib.sha256(json.dumps(info, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _guarded(work: Callable[[], Any]) -> Any:
    """What the harness raises, said in three lines."""
    try:
        return work()
    except MrropeError:
        raise
    except Exception as error:
        raise MrropeError(
            "lm-evaluation-harness stopped",
            why=f"{type(error).__name__}: {printable(str(error), limit=500)}",
            fix="MRROPE_DEBUG=1 shows where; tasks whose data are on the Hub need the network once",
        ) from error


def _write(folder: Path, results: Results) -> tuple[Path, ...]:
    """The results as the harness names and shapes them, each file written beside and renamed."""
    from lm_eval.utils import handle_non_serializable

    def line(value: object, **how: Any) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **how) + "\n"

    when = time.strftime("%Y-%m-%dT%H-%M-%S")
    whole = {name: value for name, value in results.items() if name != "samples"}
    texts = {f"results_{when}.json": line(whole, indent=2)}
    for task, samples in results.get("samples", {}).items():
        texts[f"samples_{re.sub(r'[^A-Za-z0-9._-]', '_', task)}_{when}.jsonl"] = "".join(map(line, samples))
    for name, text in texts.items():
        with written_aside(folder / name) as aside:
            aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return tuple(folder / name for name in texts)
