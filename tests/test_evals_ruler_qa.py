"""RULER's questions on documents: files in SQuAD's and HotpotQA's formats, written from their definition."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import FileTrouble, MrropeError, Refused
from mrrope_gguf.evals.ruler_qa import Documents, hotpotqa, squad
from mrrope_gguf.evals.ruler_tasks import ruler
from mrrope_gguf.evals.samples import Sample
from tests.eval_text import Bytes, read, score, written

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def paragraph(article: int, i: int) -> dict[str, Any]:
    """A paragraph that names its own answer, twice as SQuAD's annotators may, and a question without one."""
    answer = f"year {1000 + 10 * article + i}"
    context = f"Town {article}-{i} was founded in the {answer}. " + "It lies by a river. " * (1 + (article + i) % 3)
    asked = {"question": f"When was town {article}-{i} founded?", "id": f"{article}-{i}", "is_impossible": False}
    return {
        "context": context,
        "qas": [
            {**asked, "answers": [{"text": answer, "answer_start": 0}, {"text": answer[5:], "answer_start": 5}]},
            {"question": "Who sings?", "id": "x", "is_impossible": True, "answers": []},
        ],
    }


@pytest.fixture
def towns(tmp_path: Path) -> Documents:
    articles = [{"title": f"{a}", "paragraphs": [paragraph(a, i) for i in range(3)]} for a in range(20)]
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return squad(path)


@pytest.fixture
def people(tmp_path: Path) -> Documents:
    def context(i: int) -> list[list[Any]]:
        return [[f"Person {j}", [f"Person {j} was born. ", f"They met person {j + 1}."]] for j in range(i, i + 10)]

    data = [{"question": f"Whom did {i} meet?", "answer": f"person {i + 1}", "context": context(i)} for i in range(40)]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(data))
    return hotpotqa(path)


def shown(sample: Sample) -> list[str]:
    """The documents of a prompt, which must be numbered from 1."""
    text = read(sample.prefix).removeprefix(f"{ORDER}\n\nThe following are given documents.\n\n")
    found = re.split(r"(?:^|\n\n)Document (\d+):\n", text)[1:]
    assert found[::2] == [str(i) for i in range(1, len(found) // 2 + 1)]
    return found[1::2]


def test_template(towns: Documents) -> None:
    sample = next(ruler(Bytes(), "qa_1", 2000, documents=towns))
    assert written(sample).startswith(f"{ORDER}\n\nThe following are given documents.\n\nDocument 1:\nTown ")
    assert written(sample).endswith(f"\n\n{ORDER}\n\nQuestion: When was town 0-0 founded? Answer:")
    assert read(sample.answer_prefix) == " Answer:"
    assert sample.references == ("year 1000", "1000")
    assert (score(sample, "In the Year 1000"), score(sample, "1001")) == (1.0, 0.0)


@pytest.mark.parametrize("length", [1000, 2500, 4000])
def test_squad(towns: Documents, length: int) -> None:
    """Every answerable question once, in order: its own document and its article's, the budget full."""
    samples = list(ruler(Bytes(), "qa_1", length, documents=towns))
    assert len(samples) == len(towns.questions) == 60
    assert len(list(ruler(Bytes(), "qa_1", length, n=7, documents=towns))) == 7
    for sample, question in zip(samples, towns.questions, strict=True):
        documents = shown(sample)
        assert len(documents) == len(set(documents))
        assert sum(sample.references[0] in document for document in documents) == 1
        assert {towns.texts[i] for i in (*question.needed, *question.near)} <= set(documents)
        spare = length - len(sample.tokens) - 32
        assert 0 <= spare < sample.unit <= 130
        assert sample.tags == {"documents": f"{len(documents)} of 60"}
    places = [shown(sample).index(towns.texts[q.needed[0]]) for sample, q in zip(samples, towns.questions, strict=True)]
    assert len(set(places)) > 3  # shuffled


def test_hotpotqa(people: Documents) -> None:
    samples = list(ruler(Bytes(), "qa_2", 2000, documents=people))
    assert len(people.texts) == 49  # each person once, though ten questions quote most of them
    assert len(samples) == 40
    for i, sample in enumerate(samples):
        assert set(range(i, i + 10)) <= {int(d.split("\n")[0].removeprefix("Person ")) for d in shown(sample)}
        assert sample.references == (f"person {i + 1}",)
        assert sample.n_prompt + 32 <= 2000


def test_a_small_file_is_used_up(people: Documents) -> None:
    sample = next(ruler(Bytes(), "qa_2", 50000, documents=people))
    assert sample.tags == {"documents": "49 of 49"}
    assert sorted(shown(sample)) == sorted(people.texts)


def test_documents_that_do_not_fit(people: Documents) -> None:
    with pytest.raises(Refused, match="qa_2: does not fit in 800 tokens"):
        next(ruler(Bytes(), "qa_2", 800, documents=people))


def test_squad_without_the_field_of_version_2(tmp_path: Path) -> None:
    one = paragraph(0, 0)
    one["qas"] = [{key: value for key, value in one["qas"][0].items() if key != "is_impossible"}]
    path = tmp_path / "v1.1.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [one]}]}))
    assert len(squad(path).questions) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "not in SQuAD's format"),
        (b'{"data": [{"paragraphs": [{"qas": []}]}]}', "KeyError: 'context'"),
        (b'{"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}', "no question with an answer"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(MrropeError, match=message):
        squad(path)
    with pytest.raises(FileTrouble, match="cannot be read"):
        hotpotqa(tmp_path / "none.json")
