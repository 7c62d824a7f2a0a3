"""The original files of InfiniteBench and LongBench v2, written here line by line as their makers describe them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import FileTrouble, MrropeError, Refused
from mrrope_gguf.evals.longfiles import INFINITEBENCH, infinitebench, longbench
from tests.eval_text import BOS, Bytes, read, score, written

STORY = "ROSE: Hello. $$MASK$$: Hello {Rose}. " * 30


def line(**fields: Any) -> dict[str, Any]:
    """One example with the four fields every file of InfiniteBench has."""
    return {"id": 7, "context": STORY, "input": "Who?", "answer": ["JACK"], "options": [], **fields}


# task: what differs from `line`, what the prompt begins with, what it ends with, a right answer, a wrong one
EXAMPLES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "passkey": (
        {"input": "What is the pass key?", "answer": ["71432"]},
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n\nROSE",
        "\n\nWhat is the pass key?\n\nThe pass key is",
        " 71432.",
        "7143",
    ),
    "number_string": (
        {"input": "What is the sequence of digits?", "answer": ["2200012222"]},
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\nROSE",
        "\n\nWhat is the sequence of digits?\n\nThe sequence of digits is",
        "2200012222",
        "220001222",
    ),
    "kv_retrieval": (
        {"input": 'Key: "a"\nThe value associated with the specified key is: ', "answer": ["b-1"]},
        "Extract the value corresponding to the specified key in the JSON object below.\n\nROSE",
        '\n\nKey: "a"\nThe value associated with the specified key is: ',
        '"b-1"}',
        "b-2",
    ),
    "longdialogue_qa_eng": (
        {},
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\nROSE",
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
        " Jack.",
        " Rose",
    ),
    "longbook_choice_eng": (
        {"answer": ["Tom"], "options": ["Ann", "Bob", "Tom", "{x}"]},
        "Read the book and answer the question.\n\nROSE",
        "\n\nQuestion: Who?\nA. Ann\nB. Bob\nC. Tom\nD. {x}\n\nThe letter of the correct answer is",
        "C",
        "B",
    ),
    "longbook_qa_eng": (
        {"answer": ["the old man", "he"]},
        "Read the book and answer the question. Be very concise in your answer.\n\nROSE",
        "\n\nQuestion: Who?\nAnswer:",
        "An old man.",
        "she",
    ),
    "longbook_qa_chn": ({}, "阅读以下书籍然后回答问题。\n\nROSE", "\n\n问题：Who?\n答案：", "j，ack。", "x"),
    "longbook_sum_eng": ({}, "Summarize the book below.\n\nROSE", "\n\nSummary:", "Jack.", "x"),
    "math_find": (
        {"input": "You should answer. The largest number of the list is: ", "answer": 12},
        "What is the largest number in the following list?\n\nROSE",
        "\n\nYou should answer. The largest number of the list is: ",
        "12",
        "13",
    ),
    "math_calc": (
        {"answer": [1, 2]},
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ROSE",
        "\nValues:",
        "[1, 2]",
        "[2]",
    ),
    "code_run": (
        {"input": "Please give me the value of func_1(-4).", "answer": [-6]},
        "There is a function called func_1 in the following Python code.\n\nROSE",
        "\n\nPlease compute the exact value of func_1(-4). The value of func_1(-4) is",
        " -6",
        " 6",
    ),
    "code_debug": (
        {"answer": ["b.run"], "options": ["a.run", "b.run", "c", "d"]},
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\nROSE",
        "\n\nOptions:\nA. a.run\nB. b.run\nC. c\nD. d\n\nThe correct option is:",
        "B.",
        "A.",
    ),
}


def put(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", INFINITEBENCH)
def test_infinitebench(tmp_path: Path, task: str) -> None:
    fields, start, end, right, wrong = EXAMPLES[task]
    (sample,) = infinitebench(Bytes(), put(tmp_path / f"{task}.jsonl", line(**fields)), 40000)
    assert written(sample).startswith(start)
    assert written(sample).endswith(STORY + end)
    assert sample.tags == {"id": "7"}
    assert sample.generate == INFINITEBENCH[task].generate
    assert (score(sample, right), score(sample, wrong)) == (1.0, 0.0)


def test_the_name_of_the_task_can_be_given(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.jsonl", line(), line(), line())
    assert len(list(infinitebench(Bytes(), path, 4000, task="longdialogue_qa_eng", n=2))) == 2
    with pytest.raises(MrropeError, match="mine: no such task of InfiniteBench"):
        next(infinitebench(Bytes(), path, 4000))


def test_a_long_context_loses_its_middle(tmp_path: Path) -> None:
    context = "".join(f"{i:04} " for i in range(1000))
    path = put(tmp_path / "longdialogue_qa_eng.jsonl", line(context=context))
    (sample,) = infinitebench(Bytes(), path, 1000)
    assert len(sample.tokens) == 1000 - 40
    kept = read(sample.prefix).split("\n\n")[1]
    assert sample.tags == {"id": "7", "cut": str(5000 - len(kept))}
    half = len(kept) // 2
    assert context.startswith(kept[:half])
    assert context.endswith(kept[-half:])
    assert read(sample.answer_prefix).endswith("is likely")
    with pytest.raises(Refused, match="longdialogue_qa_eng: does not fit in 100 tokens"):
        next(infinitebench(Bytes(), path, 100))


BOOK = {
    "_id": "66f3", "domain": "Single-Document QA", "sub_domain": "Literary", "difficulty": "hard", "length": "short",
    "question": "Who {is} it?", "choice_A": "Ann", "choice_B": "Bob", "choice_C": "Cid", "choice_D": "Dan",
    "answer": "C", "context": STORY,
}  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
def test_longbench(tmp_path: Path, listed: bool) -> None:
    """Its JSONL form, and the one JSON list it is published as too."""
    path = put(tmp_path / "data.jsonl", BOOK, BOOK)
    if listed:
        path.write_text(json.dumps([BOOK, BOOK]))
    samples = list(longbench(Bytes(), path, 4000))
    assert [sample.index for sample in samples] == [0, 1]
    assert written(samples[0]) == (
        "Please read the following text and answer the question below.\n\n<text>\n" + STORY + "\n</text>\n\n"
        "What is the correct answer to this question: Who {is} it?\nChoices:\n(A) Ann\n(B) Bob\n(C) Cid\n(D) Dan\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert samples[0].tags == {"id": "66f3", "difficulty": "hard", "length": "short", "domain": "Single-Document QA"}
    assert samples[0].tokens.count(BOS) == 1
    assert (score(samples[0], "The correct answer is (C)."), score(samples[0], "(C)")) == (1.0, 0.0)
    (base,) = longbench(Bytes(), path, 4000, base=True, n=1)
    assert written(base) == written(samples[0]) + "\n\nThe correct answer is ("
    assert (score(base, "C) Cid"), score(base, "A")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "a"', "line 1: not JSON"),
        ('\n{"context": "a", "input": "b"}\n', "line 2: not in InfiniteBench's passkey format"),
        ("[1]", "example 1: no JSON object"),
        ("[{]", "not JSON"),
        ('{"context": 1, "input": "b", "answer": ["c"]}', "context is no text"),
        ('{"context": "a", "input": "b", "answer": []}', "there is no answer"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    """Named by their place; a file cut in mid-line is read up to there."""
    path = tmp_path / "passkey.jsonl"
    path.write_text(text)
    with pytest.raises(MrropeError, match=message):
        list(infinitebench(Bytes(), path, 4000))


def test_lines_before_a_cut_are_read(tmp_path: Path) -> None:
    path = put(tmp_path / "longdialogue_qa_eng.jsonl", line(), line())
    path.write_bytes(path.read_bytes()[:-20])
    samples = infinitebench(Bytes(), path, 4000)
    assert next(samples).references == ("JACK",)
    with pytest.raises(MrropeError, match="line 2: not JSON"):
        next(samples)


def test_other_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match="cannot be read"):
        next(longbench(Bytes(), tmp_path / "none.jsonl", 4000))
    with pytest.raises(MrropeError, match="'E', not a letter"):
        next(longbench(Bytes(), put(tmp_path / "e.jsonl", {**BOOK, "answer": "E"}), 4000))
    wrong = line(answer=["Eve"], options=["Ann", "Bob", "Cid", "Dan"])
    with pytest.raises(MrropeError, match="the answer is none of the options"):
        next(infinitebench(Bytes(), put(tmp_path / "longbook_choice_eng.jsonl", wrong), 4000))
    with pytest.raises(MrropeError, match="calls no function"):
        next(infinitebench(Bytes(), put(tmp_path / "code_run.jsonl", line()), 4000))
