"""The original files of InfiniteBench and LongBench v2, where the user has them: one JSON object a line.

Source: InfiniteBench (arXiv 2402.13718), its templates for base models; LongBench v2 (arXiv 2412.15204), its zero-shot
template, said by a user in the model's own chat template, and, for base models, an answer prefix. A context longer than
the budget loses its middle, as in both originals, and the sample is tagged with the number of tokens cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileTrouble, MrropeError
from .samples import Job, Pieces, Sample, Tokenizer, Tokens

Turn = tuple[Tokens, Tokens]
SEED = 0  # nothing is drawn
OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
BOOK = "Read the book and answer the question."
MASK = (
    'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
    "and you should try to guess who that character is.\n\n"
)
BUG = (
    "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
    "crash.\n\n"
)
HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it{memorize}. "
    "I will quiz you about the important information there.\n\n"
)
SUMS = (
    "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
    "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: "
)


@dataclass(frozen=True)
class Form:
    """The template around a context: before it, the question behind it, the start of the answer; fields in braces."""

    before: str
    question: str
    answer: str
    generate: int
    metric: str


INFINITEBENCH = {
    "passkey": Form(
        HIDDEN.replace("{memorize}", " and memorize them"), "\n\n{input}", "\n\nThe pass key is", 6, "first_integer"
    ),
    "number_string": Form(
        HIDDEN.replace("{memorize}", ""), "\n\n{input}", "\n\nThe sequence of digits is", 12, "first_integer"
    ),
    "kv_retrieval": Form(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n", "\n\n{input}", "", 50,
        "any_word",
    ),
    "longdialogue_qa_eng": Form(
        MASK, "", "\n\nThe name that has been replaced with $$MASK$$ is likely", 40, "any_name"
    ),
    "longbook_choice_eng": Form(
        BOOK + "\n\n", "\n\nQuestion: {input}" + OPTIONS, "\n\nThe letter of the correct answer is", 40, "option"
    ),
    "longbook_qa_eng": Form(
        BOOK + " Be very concise in your answer.\n\n", "\n\nQuestion: {input}", "\nAnswer:", 40, "f1"
    ),
    "longbook_qa_chn": Form("阅读以下书籍然后回答问题。\n\n", "\n\n问题：{input}", "\n答案：", 40, "f1_chinese"),
    "longbook_sum_eng": Form("Summarize the book below.\n\n", "", "\n\nSummary:", 1200, "rouge"),
    "math_find": Form("{lead}\n\n", "\n\n{input}", "", 3, "first_number"),
    "math_calc": Form(SUMS, "", "\nValues:", 30000, "running_integers"),
    "code_run": Form(
        "There is a function called {func} in the following Python code.\n\n",
        "\n\nPlease compute the exact value of {func_call}.", " The value of {func_call} is", 5, "last_integer",
    ),
    "code_debug": Form(BUG, "\n\nOptions:" + OPTIONS, "\n\nThe correct option is:", 5, "bug_option"),
}  # fmt: skip

LONGBENCH = Form(
    "Please read the following text and answer the question below.\n\n<text>\n",
    "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}"
    '\n\nFormat your response as follows: "The correct answer is (insert answer here)".',
    "",
    128,
    "choice",
)
LONGBENCH_BASE = "\n\nThe correct answer is ("


def infinitebench(
    tokenizer: Tokenizer, path: Path, length: int, *, task: str = "", n: int | None = None
) -> Iterator[Sample]:
    """The first `n` (or all) examples of one of InfiniteBench's files as samples of at most `length` tokens.

    task: a name in INFINITEBENCH; the file's own name says it where it is not given.
    Raises FileTrouble, or MrropeError naming the line, where the file is missing or no such file.
    """
    task = task or path.stem
    if task not in INFINITEBENCH:
        why = "the tasks are " + ", ".join(INFINITEBENCH)
        raise MrropeError(f"{task}: no such task of InfiniteBench", why=why, fix="give the file its original name")
    form, pieces = INFINITEBENCH[task], Pieces(tokenizer)
    for i, (at, line) in enumerate(_lines(path, n)):
        with _Told(at, "InfiniteBench's " + task):
            context = _text(line, "context")
            fields, references = _infinite(task, line)
        job = Job(pieces, task, form.metric, length, form.generate, SEED, i)
        yield _sample(job, form, context, fields, references, {"id": str(line.get("id", i))})


def longbench(
    tokenizer: Tokenizer, path: Path, length: int, *, base: bool = False, turn: Turn = ((), ()), n: int | None = None
) -> Iterator[Sample]:
    """The first `n` (or all) examples of LongBench v2's file, JSONL or its one JSON list, of at most `length` tokens.

    base: an answer prefix and a score by the letter alone, for models that follow no instructions.
    turn: what the model's chat template puts before and behind what a user says, BOS with it; empty: the text as it is.
    Tagged with the example's id, difficulty, length class and domain. Raises as `infinitebench` does.
    """
    pieces = Pieces(tokenizer)
    form = LONGBENCH
    if base:
        form = Form(form.before, form.question, LONGBENCH_BASE, 4, "letter")
    for i, (at, line) in enumerate(_lines(path, n)):
        with _Told(at, "LongBench v2's"):
            context = _text(line, "context")
            fields = {"question": _text(line, "question"), **{c: _text(line, f"choice_{c}") for c in "ABCD"}}
            right = _text(line, "answer")
            if right not in tuple("ABCD"):
                raise ValueError(f"the answer is {right!r}, not a letter from A to D")
        tags = {name.strip("_"): str(line[name]) for name in ("_id", "difficulty", "length", "domain") if name in line}
        job = Job(pieces, "longbench_v2", form.metric, length, form.generate, SEED, i)
        yield _sample(job, form, context, fields, (right,), tags, turn)


def _sample(
    job: Job, form: Form, context: str, fields: Mapping[str, str], references: tuple[str, ...], tags: dict[str, str],
    turn: Turn = ((), ()),
) -> Sample:  # fmt: skip
    """The prompt, the context's middle cut out where it is too long."""
    before = _put(form.before, fields)
    head = (*turn[0], *job.pieces(before)) if turn[0] else job.pieces.start(before)
    question = job.pieces(_put(form.question, fields)) if form.question else ()
    answer = (*(job.pieces(_put(form.answer, fields)) if form.answer else ()), *turn[1])
    tokens, room = job.pieces(context), job.room(head, question, answer)
    if len(tokens) > room:
        tags = {**tags, "cut": str(len(tokens) - room)}
        tokens = tokens[: room - room // 2] + tokens[len(tokens) - room // 2 :]
    return job.sample((*head, *tokens), question, answer, references, tags=tags)


def _put(template: str, fields: Mapping[str, str]) -> str:
    """The template with its fields; braces inside a field stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


def _infinite(task: str, line: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """An InfiniteBench example's fields for its template, and its references."""
    answers = line["answer"] if isinstance(line["answer"], list) else [line["answer"]]
    references = tuple(str(answer) for answer in answers)
    if not references:
        raise ValueError("there is no answer")
    fields = {"input": _text(line, "input")}
    if task in ("longbook_choice_eng", "code_debug"):
        options = dict(zip("ABCD", map(str, line["options"]), strict=True))
        letters = [letter for letter, text in options.items() if text == references[0]]
        if not letters:
            raise ValueError("the answer is none of the options")
        return {**fields, **options}, (references[0], letters[0])
    if task == "code_run":
        call = re.search(r"(func_\d+)\(-?\d+\)", fields["input"])
        if call is None:
            raise ValueError("the question calls no function")
        fields |= {"func": call[1], "func_call": call[0]}
    if task == "math_find":
        which = re.search(r"The (\w+) number", fields["input"]) or re.search(r"[Tt]he (\w+)", fields["input"])
        if which is None:
            raise ValueError("the question names no number")
        fields["lead"] = f"What is {which[0].lower()} in the following list?"
    return fields, references


def _text(line: Mapping[str, Any], name: str) -> str:
    if not isinstance(line[name], str):
        raise TypeError(f"{name} is no text")
    return str(line[name])


class _Told:
    """Turns what a malformed example raises into an error that names the place."""

    def __init__(self, at: str, format_: str) -> None:
        self._at, self._format = at, format_

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if isinstance(error, (KeyError, IndexError)):
            error = ValueError(f"there is no {error}")
        if isinstance(error, (TypeError, ValueError)):
            raise MrropeError(
                f"{self._at}: not in {self._format} format",
                why=str(error),
                fix="take the file as its makers publish it",
            ) from error


def _lines(path: Path, n: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The file's objects, each with its place for errors; a file that is one JSON list gives its members."""
    try:
        with open(path, encoding="utf-8") as file:
            whole = file.read(1) == "["
            file.seek(0)
            each = enumerate(json.load(file) if whole else file, 1)
            found = 0
            for number, item in each:
                if found == n:
                    return
                if isinstance(item, str) and not item.strip():
                    continue
                found += 1
                at = f"{path}, {'example' if whole else 'line'} {number}"
                line = _parsed(item, at) if isinstance(item, str) else item
                if not isinstance(line, dict):
                    raise MrropeError(f"{at}: no JSON object", why=f"it is {type(line).__name__}", fix="see the file")
                yield at, line
    except (OSError, UnicodeDecodeError) as error:
        raise FileTrouble(f"{path}: cannot be read", why=str(error), fix="name the benchmark's JSONL file") from error
    except json.JSONDecodeError as error:
        raise MrropeError(f"{path}: not JSON", why=str(error), fix="name the benchmark's JSONL file") from error


def _parsed(item: str, at: str) -> Any:
    try:
        return json.loads(item)
    except json.JSONDecodeError as error:
        raise MrropeError(
            f"{at}: not JSON", why=f"{error}; the line has {len(item)} characters", fix="download the file again"
        ) from error
