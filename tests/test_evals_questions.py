"""Tasks in a suite: the same questions for every way, within their lengths, scored and reported as what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import texts as library
from mrrope_gguf.errors import MrropeError, Refused
from mrrope_gguf.evals import plans, tasks
from mrrope_gguf.evals.passes import TaskPass
from mrrope_gguf.evals.report import report
from mrrope_gguf.evals.report_read import read
from mrrope_gguf.evals.scoring import METRICS
from mrrope_gguf.evals.suite import open_host
from mrrope_gguf.evals.trie import run as ask
from tests import tiny
from tests.engine_worker import Worker
from tests.eval_suite import OPTIONS, Cells, cells, planned, prose, request, run

pytestmark = pytest.mark.engine

WINDOW = 1024
RETRIEVER = Path(__file__).parent / "data" / "retriever-256.gguf"
WAYS = ("none", "truncate", "yarn", "elastic")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prose(tmp_path / "t.txt", 2000)
    return tiny.make(tmp_path / "m.gguf", n_layer=1, n_ctx=WINDOW)


def infinitebench(folder: Path) -> str:
    """Three examples of a dialogue task, one longer than any length here, all with a separator that ends no line."""
    lines = [
        {"context": "MARY: no.\u2028ANN: a fine day " * n, "input": "", "answer": ["ANN", "ann lee"]}
        for n in (4, 20, 300)
    ]
    file = folder / "longdialogue_qa_eng.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n\n" for line in lines))
    return str(file)


def books(folder: Path) -> str:
    """One of the two tasks whose answers are not judged by plain strings."""
    file = folder / "longbook_qa_chn.jsonl"
    file.write_text(json.dumps({"context": "a b. " * 40, "input": "who", "answer": ["a b", "b"]}))
    return str(file)


def longbench(folder: Path) -> str:
    line = {"context": "a stone " * 60, "question": "what?", "answer": "C", **{f"choice_{c}": c * 3 for c in "ABCD"}}
    file = folder / "data.json"
    file.write_text(json.dumps([line, {**line, "answer": "A"}]))
    return str(file)


def wanted(folder: Path, what: str) -> Any:
    ways, text = ",".join(WAYS), str(folder / "t.txt")
    others: dict[str, dict[str, Any]] = {
        "needle": {"depths": (0.0, 1.0), "samples": 2},
        "needle, prose": {"depths": (0.25,), "hay": text},
        "needle, keys": {"keys": 3},
        "ruler": {"tasks": ["niah_multikey_1", "vt"], "texts": [text], "samples": 2},
        "retrieval": {"tasks": ["passkey", "number"], "samples": 2},
        "kv": {"tasks": ["kv"], "samples": 1},
        "files": {"files": [infinitebench(folder), books(folder), longbench(folder)]},
    }
    lengths = {"kv": (2560,), "ruler": (2048,)}.get(what, (WINDOW, 2048))
    kind = "retrieval" if what in ("kv", "files") else what.partition(",")[0]
    return request(kind, ways, lengths, **others[what])


SUITES = ("needle", "needle, prose", "needle, keys", "ruler", "retrieval", "kv", "files")
COUNTS = {"needle": 4, "needle, prose": 1, "needle, keys": 3, "ruler": 4, "retrieval": 4, "kv": 20, "files": 6}


@pytest.mark.parametrize("what", SUITES)
def test_questions(engine: Worker, path: Path, tmp_path: Path, what: str) -> None:
    asked = wanted(tmp_path, what)
    runs: Cells = engine.call(run, path, asked, tmp_path / "out")
    made = cells(runs)
    assert len(made) == COUNTS[what] * len(asked.lengths) * len(WAYS)
    assert set(made) == {key for task in engine.call(planned, path, asked) for key in task.keys}
    questions: dict[tuple[str, int, str], set[str]] = {}
    for key, cell in made.items():
        name = (cell["task"], cell["length"], key.rsplit("/", 1)[1])
        put = [cell["depth"], cell["seed"], cell["expected"], cell["tokens"] * (cell["way"] != "truncate")]
        questions.setdefault(name, set()).add(json.dumps(put) if cell["way"] != "truncate" else "")
        assert cell["tokens"] <= (min(cell["length"], WINDOW) if cell["way"] == "truncate" else cell["length"])
    assert all(len(each - {""}) == 1 for each in questions.values())
    assert len(questions) == COUNTS[what] * len(asked.lengths)
    engine.call(check_scores, path, asked, made)
    whole = read(tmp_path / "out")
    assert (sum(map(len, whole.answers.values())), whole.skipped) == (len(made), 0)
    assert report(tmp_path / "out").summary.tasks


def check_scores(path: Path, asked: Any, made: Cells) -> None:
    """Each answer again, alone: its prompt, its loss, what was said, and its score."""
    spec, lengths, window = plans.make_spec(path, asked)
    with open_host(spec) as host:
        for task in plans.make_passes(host.plain(), spec, asked, lengths, window):
            assert isinstance(task, TaskPass)
            if task.way not in ("none", "truncate"):
                continue
            llm = host.plain()
            items = tasks.items(llm, spec, task)
            assert len(items) == len(task.keys)
            for item in items[:3]:
                cell = made[task.key(item.length, item.sample)]
                assert item.prompt.n_ctx <= item.length
                prompt = tasks.shown(llm, item, task)
                if task.way == "truncate" and item.length > WINDOW:
                    assert prompt.n_ctx <= WINDOW
                    assert prompt.tokens[1:] == item.prompt.tokens[-len(prompt.tokens) + 1 :]
                    assert prompt.tokens[0] == item.prompt.tokens[0] == llm.token_bos()
                (said,) = ask(llm, [prompt], share=False)
                assert cell["said"] == tasks.text_of(llm, said.generated)
                assert cell["loss"] == (round(sum(said.losses) / len(said.losses), 6) if said.losses else None)
                score = METRICS[item.metric](cell["said"], item.references)
                assert (cell["score"], cell["exact"]) == (round(score, 6), score == 1)


def test_what_is_found_is_scored(path: Path, tmp_path: Path) -> None:
    """A random model finds nothing: here is one that says the answer."""
    asked = wanted(tmp_path, "needle")
    spec, lengths, window = plans.make_spec(path, request("needle", "none", asked.lengths, depths=(0.5,)))
    with open_host(spec) as host:
        llm = host.plain()
        (task,) = plans.make_passes(llm, spec, request("needle", "none", asked.lengths, depths=(0.5,)), lengths, window)
        assert isinstance(task, TaskPass)
        (item, _) = tasks.items(llm, spec, task)
        stop = item.prompt.stop
        assert stop is not None
        answer = list(item.prompt.answer)
        assert [stop(answer[:i]) for i in range(len(answer) + 1)] == [False] * len(answer) + [True]
        assert METRICS[item.metric](tasks.text_of(llm, answer), item.references) == 1


def test_a_model_that_retrieves(engine: Worker, tmp_path: Path) -> None:
    """In its window it finds every needle; past it, only what a table or the last tokens leave within its reach."""
    wanted = request("needle", ",".join(WAYS), (256, 512, 1024), depths=(0.0, 0.5, 1.0))
    made = cells(engine.call(run, RETRIEVER, wanted, tmp_path / "out"))
    score = {(c["way"], c["length"], c["depth"]): c["score"] for c in made.values()}
    assert all(score[way, 256, depth] == 1 for way in WAYS for depth in (0, 50, 100))
    assert all(score[way, n, depth] == 1 for way in ("yarn", "elastic") for n in (512, 1024) for depth in (0, 50, 100))
    assert all(score["none", 1024, depth] == 0 for depth in (0, 50, 100))
    assert [score["truncate", 1024, depth] for depth in (0, 50, 100)] == [0, 0, 1]
    summary = report(tmp_path / "out").summary
    (task,) = summary.tasks
    assert {each.way: each.length for each in task.effective} == {
        "none": 256,
        "truncate": 256,
        "yarn": 1024,
        "elastic": 1024,
    }


def test_sliding_windows_that_are_kept(stock: Worker, tmp_path: Path) -> None:
    """The same answers, whether a prompt is read whole or from where it parts from the one before."""
    path = tiny.make(tmp_path / "g.gguf", "gemma3", n_ctx=WINDOW)
    found = []
    for options in (OPTIONS, {**OPTIONS, "swa_full": True}):
        wanted = request("needle", "none,truncate", (WINDOW,), depths=(0.0, 0.5, 1.0), options=options)
        found.append(stock.call(run, path, wanted, tmp_path / "out" / str(len(options))))
    assert found[0]["#head"] == found[1]["#head"]
    for key, cell in cells(found[0]).items():
        assert found[1][key]["loss"] == pytest.approx(cell["loss"], abs=1e-3)


def test_names_hold_what_questions_depend_on(path: Path, tmp_path: Path) -> None:
    """The same cell is the same question, whatever was asked for besides; another seed or another text is another."""
    prose(tmp_path / "u.txt", 2000, seed=1)
    text, other = str(tmp_path / "t.txt"), str(tmp_path / "u.txt")
    base: dict[str, Any] = {"tasks": ["niah_single_2", "fwe"], "texts": [text], "samples": 2}
    suites = [
        request("ruler", "none", (WINDOW,), **{**base, **change})
        for change in ({}, {"samples": 3}, {"seed": 43}, {"texts": [other]})
    ]
    suites += [
        request("retrieval", "none", (WINDOW,), tasks=["passkey"], samples=n, seed=s)
        for n, s in ((2, 1), (3, 1), (2, 2))
    ]
    suites += [request("needle", "none", (WINDOW,), keys=k, seed=s) for k, s in ((2, 1), (3, 1), (2, 2))]
    suites += [
        request("needle", "none", (WINDOW,), depths=(0.5,), samples=n, seed=s) for n, s in ((1, 1), (2, 1), (1, 2))
    ]
    known: dict[str, tuple[int, ...]] = {}
    shared = 0
    for asked in suites:
        spec, lengths, window = plans.make_spec(path, asked)
        with open_host(spec) as host:
            llm = host.plain()
            for task in plans.make_passes(llm, spec, asked, lengths, window):
                assert isinstance(task, TaskPass)
                for item in tasks.items(llm, spec, task):
                    key = task.key(item.length, item.sample)
                    shared += key in known
                    assert known.setdefault(key, item.prompt.tokens) == item.prompt.tokens, key
    assert shared >= 5  # more samples of the same seed take the first ones over


def test_essays_are_tagged(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of `mrrope texts` is in the public domain, a file of the user's that is called so is not known to be."""
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    fetched, own = library.TEXTS["voyage-out"].path, tmp_path / "voyage-out.txt"
    fetched.parent.mkdir(parents=True)
    monkeypatch.setattr(library, "save", lambda name, say=None: prose(fetched, 2000))
    asked = {"tasks": ["niah_single_2", "fwe"], "samples": 1}
    for given, tag in (("voyage-out", "pd"), (str(prose(own, 2000)), "user")):
        runs = run(path, request("ruler", "none", (WINDOW,), texts=[given], **asked), tmp_path / tag)
        found = {cell["task"]: cell.get("tags") for cell in cells(runs).values()}
        assert found == {"ruler/niah_single_2": {"essay": tag, "text": "voyage-out"}, "ruler/fwe": None}


def test_lengths_that_are_too_short(path: Path, tmp_path: Path) -> None:
    for what, others in (("needle", {}), ("retrieval", {"tasks": ["kv"]}), ("ruler", {"tasks": ["cwe"]})):
        with pytest.raises((Refused, MrropeError), match=r"haystack|does not fit|no list"):
            planned(path, request(what, "none", (256,), **others))
    said: list[str] = []
    asked = request("all", "none,yarn", (512, 2048), texts=[str(tmp_path / "t.txt")])
    spec, lengths, window = plans.make_spec(path, asked)
    with open_host(spec) as host:
        found = plans.make_passes(host.plain(), spec, asked, lengths, window, said.append)
    assert any("retrieval/kv is left out at 512 tokens" in line for line in said)
    assert {task.lengths for task in found if isinstance(task, TaskPass)} == {(512, 2048), (2048,)}
    assert {task.task for task in found} >= {"ppl", "kl", "needle/noise", "retrieval/passkey", "ruler/vt"}


def test_files_of_another_kind(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv_retrieval.jsonl"
    file.write_text('{"context": "a", "input": "b"}\n')
    with pytest.raises(MrropeError, match="line 1: not in InfiniteBench's kv_retrieval format"):
        planned(path, request("retrieval", "none", (WINDOW,), files=[str(file)]))
    (tmp_path / "other.jsonl").write_text("[1, 2\n")
    with pytest.raises(MrropeError, match="not JSON"):
        planned(path, request("retrieval", "none", (WINDOW,), files=[str(tmp_path / "other.jsonl")]))


def test_text_is_named_by_what_was_asked(path: Path, tmp_path: Path) -> None:
    """Needles lie in --hay, losses are of --text, whatever the order in which they are named."""
    prose(tmp_path / "u.txt", 2000, seed=1)
    t, u = str(tmp_path / "t.txt"), str(tmp_path / "u.txt")
    for texts, hay in (([t, u], t), ([t], u)):
        found = planned(path, request("all", "none", (WINDOW,), texts=texts, hay=hay))
        assert {task.text for task in found if not isinstance(task, TaskPass)} == {Path(each).stem for each in texts}
        assert f"needle/{Path(hay).stem}" in {task.task for task in found}


def test_summaries(engine: Worker, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "longbook_sum_eng.jsonl"
    file.write_text(json.dumps({"context": "a b. " * 40, "input": "", "answer": ["a b c"]}))
    asked = request("retrieval", "none", (2048,), files=[str(file)])
    (cell,) = cells(engine.call(run, path, asked, tmp_path / "out")).values()
    assert cell["task"] == "infinitebench/longbook_sum_eng"
    assert cell["score"] == round(METRICS["rouge"](cell["said"], ["a b c"]), 6)


def test_longbench_is_said_in_the_chat_template(path: Path, tmp_path: Path) -> None:
    """By models that have one; others get the text as it is, and a prefix of the answer."""
    made: dict[str, Any] = {}
    for name, template in ("chat", "<|{{ messages[0].role }}|>{{ messages[0].content }}<|end|>"), ("base", None):
        (tmp_path / name).mkdir()
        other = tiny.make(
            tmp_path / name / "m.gguf", n_layer=1, n_ctx=WINDOW, extra={"tokenizer.chat_template": template}
        )
        asked = request("retrieval", "none", (2048,), files=[longbench(tmp_path)])
        spec, lengths, window = plans.make_spec(other, asked)
        with open_host(spec) as host:
            (task,) = plans.make_passes(host.plain(), spec, asked, lengths, window)
            assert isinstance(task, TaskPass)
            item = tasks.items(host.plain(), spec, task)[0]
            made[name] = tasks.text_of(host.plain(), item.prompt.tokens), item.metric
    assert made["chat"][0].startswith("<|user|>Please read")
    assert made["chat"][0].endswith('(insert answer here)".<|end|>')
    assert made["base"][0].startswith("Please read")
    assert made["base"][0].endswith("The correct answer is (")
    assert (made["chat"][1], made["base"][1]) == ("choice", "letter")


def test_a_template_that_hides_the_message_is_refused(tmp_path: Path) -> None:
    other = tiny.make(tmp_path / "m.gguf", n_layer=1, n_ctx=WINDOW, extra={"tokenizer.chat_template": "hello"})
    with pytest.raises(Refused, match="chat template cannot be applied") as caught:
        planned(other, request("retrieval", "none", (2048,), files=[longbench(tmp_path)]))
    assert "does not show" in caught.value.why


def test_all_takes_tasks_of_both_kinds_and_files_beside_them(path: Path, tmp_path: Path) -> None:
    def names(**others: Any) -> set[str]:
        asked = request("all", "none", (2560,), texts=[str(tmp_path / "t.txt")], **others)
        found = planned(path, asked)
        return {task.task for task in found if isinstance(task, TaskPass) and not task.task.startswith("needle")}

    assert names(tasks=["vt", "passkey"]) == {"ruler/vt", "retrieval/passkey"}
    assert names(tasks=["kv"]) == {"retrieval/kv"}
    with_file = names(files=[longbench(tmp_path)])
    assert {"longbench/data", "retrieval/passkey", "retrieval/number", "retrieval/kv", "ruler/vt"} <= with_file
