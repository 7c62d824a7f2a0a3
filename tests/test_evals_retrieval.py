"""InfiniteBench's generated tasks: templates word for word, budgets, depths, one JSON object for many questions."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import MrropeError, Refused
from mrrope_gguf.evals.retrieval import number_digits, retrieval
from mrrope_gguf.evals.samples import Sample
from tests.eval_text import Bytes, read, score, written

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
GENERATE = {"passkey": 6, "number": 12, "kv": 50}


@pytest.mark.parametrize(
    ("task", "find", "name", "digits"),
    [("passkey", "Find it and memorize them.", "pass key", 5), ("number", "Find it.", "sequence of digits", 10)],
)
def test_hidden_digits(task: str, find: str, name: str, digits: int) -> None:
    intro = (
        f"There is an important info hidden inside a lot of irrelevant text. {find} "
        "I will quiz you about the important information there.\n\n"
    )
    samples = list(retrieval(Bytes(), task, 3000, n=11))
    for i, sample in enumerate(samples):
        (key,) = sample.references
        assert re.fullmatch(f"[0-9]{{{digits}}}", key)
        needle = f"The {name} is {key}. Remember it. {key} is the {name}.\n"
        before, after = written(sample).removeprefix(intro).split(needle)
        n = (len(before) + len(after)) // len(NOISE)
        end = f"\n\nWhat is the {name}?\n\nThe {name} is"
        assert before == NOISE * round(i / 10 * n)  # depths 0 to 1, evenly
        assert before + after == NOISE * n + end
        assert read(sample.tokens[sample.positions[0] :]).startswith(needle)
        assert 0 <= 3000 - len(sample.tokens) - GENERATE[task] < len(NOISE) == sample.unit
        assert read(sample.answer_prefix) == f"\n\nThe {name} is"
        assert score(sample, f" {key}. Remember") == 1.0
        assert score(sample, f" {key}0") == 0.0
    assert len({sample.references for sample in samples}) == 11
    assert samples[0].positions < samples[5].positions < samples[10].positions


def test_numbers_have_runs() -> None:
    """Five digits, and five repetitions of one beside itself: at most five runs, each of one digit."""
    for seed in range(200):
        key = number_digits(random.Random(seed))
        assert len(key) == 10
        assert len(re.findall(r"(.)\1*", key)) <= 5
    assert {len(max(re.findall(r"((.)\2*)", number_digits(random.Random(s))))[0]) for s in range(200)} > {2, 3, 4}


def opened(sample: Sample) -> dict[str, str]:
    """The prompt's JSON object."""
    intro = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    found: dict[str, str] = json.loads(read(sample.prefix).removeprefix(intro))
    return found


def test_kv() -> None:
    samples = list(retrieval(Bytes(), "kv", 4000, n=5))
    for i, sample in enumerate(samples):
        pairs = opened(sample)
        (key,) = re.findall(r'\n\nKey: "(.*)"', read(sample.question))
        assert read(sample.question) == f'\n\nKey: "{key}"'
        assert read(sample.answer_prefix) == "\nThe value associated with the specified key is: "
        assert sample.references == (pairs[key],)
        assert list(pairs).index(key) == int(len(pairs) * (i + 0.5) / 5)
        assert written(sample).count(key) == 2
        assert written(sample).count(pairs[key]) == 1
        assert all(re.fullmatch("[0-9a-f-]{36}", text) for pair in pairs.items() for text in pair)
        assert 0 <= 4000 - len(sample.tokens) - 50 < sample.unit == len(f', "{key}": "{key}"')
        assert read(sample.tokens[sample.positions[0] :]).removeprefix(", ").startswith(f'"{key}": "')
        assert score(sample, f'"{pairs[key]}".') == 1.0
        assert score(sample, pairs[key][:-1]) == 0.0
    assert [sample.seed for sample in samples] == [42, 43, 44, 45, 46]


def test_many_questions_on_one_object() -> None:
    samples = list(retrieval(Bytes(), "kv", 6000, n=2, questions=20))
    assert [sample.index for sample in samples] == list(range(40))
    assert [sample.seed for sample in samples] == [42] * 20 + [43] * 20
    first, second = samples[:20], samples[20:]
    assert len({sample.prefix for sample in first}) == len({sample.prefix for sample in second}) == 1
    assert first[0].prefix != second[0].prefix
    assert len({sample.references for sample in samples}) == 40
    pairs = opened(first[0])
    for q, sample in enumerate(first):
        (key,) = re.findall('Key: "(.*)"', read(sample.question))
        assert pairs[key] == sample.references[0]
        assert list(pairs).index(key) == int(len(pairs) * (q + 0.25) / 20)


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.parametrize(("task", "questions"), [("passkey", 1), ("number", 1), ("kv", 7)])
def test_budget_in_a_real_vocabulary(smollm2: Path, task: str, questions: int) -> None:
    import llama_cpp

    llm: Any = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    for length in (1500, 4097):
        for sample in retrieval(llm, task, length, n=3, questions=questions):
            assert 0 <= length - len(sample.tokens) - GENERATE[task] < sample.unit <= 100
            text = written(sample, llm)
            assert text.count(sample.references[0]) == (1 if task == "kv" else 2)
    llm.close()


@pytest.mark.parametrize("task", GENERATE)
def test_the_same_seed_gives_the_same_texts(task: str) -> None:
    first = list(retrieval(Bytes(), task, 2000, n=3))
    assert list(retrieval(Bytes(), task, 2000, n=3)) == first
    other = list(retrieval(Bytes(), task, 2000, n=3, seed=43))
    assert other[0].references != first[0].references


def test_bad_numbers() -> None:
    with pytest.raises(MrropeError, match="keys: no such task"):
        retrieval(Bytes(), "keys", 2000)
    with pytest.raises(MrropeError, match="20 texts, 2 questions"):
        retrieval(Bytes(), "passkey", 2000, questions=2)
    with pytest.raises(MrropeError, match="0 texts"):
        retrieval(Bytes(), "kv", 2000, n=0)
    for task in GENERATE:
        with pytest.raises(Refused, match=f"{task}: does not fit in 300 tokens") as caught:
            list(retrieval(Bytes(), task, 300))
        least = int(caught.value.why.split("at least ")[1].split(",")[0])
        assert len(list(retrieval(Bytes(), task, least, n=1))) == 1
    with pytest.raises(Refused):
        list(retrieval(Bytes(), "kv", 1000, questions=20))
