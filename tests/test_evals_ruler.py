"""RULER's tasks as a whole: the table of the definition, budgets, seeds, shared prefixes, errors that help."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import FileTrouble, MrropeError, Refused
from mrrope_gguf.evals import wordlists
from mrrope_gguf.evals.essay import essay, from_file, public_domain
from mrrope_gguf.evals.ruler_tasks import CORE, OFFLINE, TASKS, ruler
from mrrope_gguf.evals.samples import Pieces, Sample
from tests.eval_text import BOS, PROSE, Bytes, Spacing, prose, read, written

# task: tokens of the answer
DEFINITION = {
    "niah_single_1": 128,
    "niah_single_2": 128,
    "niah_single_3": 128,
    "niah_multikey_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}


@pytest.fixture(scope="module")
def smollm2_words(smollm2: Path) -> Iterator[Any]:
    import llama_cpp

    llm = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    yield llm
    llm.close()


def make(tokenizer: Any, task: str, length: int, n: int = 2, seed: int = 42) -> list[Sample]:
    return list(ruler(tokenizer, task, length, n=n, seed=seed, essay=prose()))


def within(sample: Sample, length: int) -> None:
    """The budget holds prompt and answer, and would not hold one unit of filler more."""
    spare = length - len(sample.tokens) - DEFINITION[sample.task]
    assert 0 <= spare < sample.unit
    assert (sample.length, sample.generate) == (length, DEFINITION[sample.task])


def test_the_tasks_are_rulers() -> None:
    assert {name: task.generate for name, task in TASKS.items()} == DEFINITION
    assert len(OFFLINE) == 11
    assert CORE == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    parts = [name for name, task in TASKS.items() if task.metric == "string_match_part"]
    assert parts == ["qa_1", "qa_2"]
    assert {task.metric for name, task in TASKS.items() if name not in parts} == {"string_match_all"}


@pytest.mark.parametrize("length", [3500, 9001, 12345])
@pytest.mark.parametrize("task", OFFLINE)
def test_budget_in_bytes(task: str, length: int) -> None:
    for sample in make(Bytes(), task, length):
        within(sample, length)
        assert sample.tokens.count(BOS) == 1
        assert sample.tokens[0] == BOS


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.parametrize("length", [1024, 4096, 6001])
@pytest.mark.parametrize("task", OFFLINE)
def test_budget_in_a_real_vocabulary(smollm2_words: Any, task: str, length: int) -> None:
    """And the pieces of a prompt, joined, are nearly the tokens of its text read in one go."""
    (sample,) = make(smollm2_words, task, length, 1)
    within(sample, length)
    whole = smollm2_words.tokenize(written(sample, smollm2_words).encode(), add_bos=True, special=False)
    assert abs(len(whole) - len(sample.tokens)) <= 0.01 * len(whole)


@pytest.mark.parametrize(("task", "unit"), [("niah_single_1", 90), ("vt", 90), ("niah_single_2", 12)])
def test_units_are_small(task: str, unit: int) -> None:
    """A line of noise with its line break is 90 bytes; a word of the essay, with its space, at most 9."""
    assert 0 < make(Bytes(), task, 5000, 1)[0].unit <= unit


@pytest.mark.parametrize("task", OFFLINE)
def test_a_sample_is_its_seeds(task: str) -> None:
    first, second = make(Bytes(), task, 4000)
    assert (first.seed, second.seed, first.index, second.index) == (42, 43, 0, 1)
    assert first.references != second.references
    assert make(Bytes(), task, 4000) == [first, second]
    (again,) = make(Bytes(), task, 4000, 1, seed=second.seed)
    assert (again.tokens, again.references) == (second.tokens, second.references)
    assert second.to_json()["seed"] == 43
    assert "prefix" not in second.to_json()


def test_python_and_platform_do_not_change_a_seed() -> None:
    """Written down once: other figures mean that published scores were of other prompts."""
    first = {task: make(Bytes(), task, 4000, 1)[0].references for task in ("niah_single_1", "vt", "cwe", "fwe")}
    assert first["niah_single_1"] == ("2867825",)
    assert first["vt"] == ("TNJMX", "LBHCE", "WSWXA", "GUNCK", "FVTZI")
    assert first["cwe"][:3] == ("crook", "dashboard", "leptocephalus")
    assert first["fwe"] == ("duruaf", "cgzjdb", "uxyclm")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_parts_are_a_prefix_a_question_and_the_start_of_the_answer(task: str) -> None:
    (sample,) = make(Bytes(), task, 4000, 1)
    assert read(sample.question).startswith("\nWhat is the special magic number for ")
    assert read(sample.question).endswith(" mentioned in the provided text?")
    assert read(sample.answer_prefix).startswith(" The special magic number for ")
    assert sample.tokens == sample.prefix + sample.question + sample.answer_prefix
    assert sample.n_prompt == len(sample.tokens)


def test_longer_budgets_share_the_start() -> None:
    """The same seed at a greater length: the same needle, and the same tokens up to where it stands."""
    (short,), (long,) = (make(Bytes(), "niah_single_1", length, 1) for length in (3000, 6000))
    assert short.references == long.references
    shared = next(i for i, (a, b) in enumerate(zip(short.tokens, long.tokens, strict=False)) if a != b)
    assert shared >= min(short.positions[0], long.positions[0])


@pytest.mark.parametrize("task", OFFLINE)
def test_too_short_a_budget_is_refused_with_both_numbers(task: str) -> None:
    """What the error says is enough for what it found missing: lengths that grow by it come to an end."""
    length = 150
    for _ in range(40):
        error = refusal(task, length)
        if error is None:
            break
        assert f"{task}: does not fit in {length} tokens" in str(error)
        least = int(error.why.split("at least ")[1].split(",")[0])
        assert least > length
        length = least
    else:
        pytest.fail(f"{length} tokens still do not do")
    assert length < 5000


def refusal(task: str, length: int) -> Refused | None:
    try:
        make(Bytes(), task, length, 1)
    except Refused as error:
        return error
    return None


def test_cwe_says_when_its_words_run_out() -> None:
    with pytest.raises(Refused, match=r"no list of 900000 tokens") as caught:
        make(Bytes(), "cwe", 900_000, 1)
    assert "words there are, 3 times each" in caught.value.why


def test_errors_of_the_call_come_before_any_sample() -> None:
    with pytest.raises(MrropeError, match="niah: no such task of RULER"):
        ruler(Bytes(), "niah", 4096)
    with pytest.raises(MrropeError, match="qa_2: no documents") as caught:
        ruler(Bytes(), "qa_2", 4096)
    assert "HotpotQA" in caught.value.fix
    with pytest.raises(MrropeError, match="niah_single_2: no essay"):
        next(ruler(Bytes(), "niah_single_2", 4096))


def test_words_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """importlib finds no package of that name: the same as on a machine without the extra."""
    real = importlib.resources.files
    monkeypatch.setattr(importlib.resources, "files", lambda name: real(name.replace("wonder", "no_such_wonder")))
    wordlists.word_list.cache_clear()
    with pytest.raises(MrropeError, match="RULER's words are not there") as caught:
        wordlists.word_list("noun")
    assert caught.value.fix == "pip install 'mrrope-gguf[eval]'"


def test_words() -> None:
    """wonderwords 3.0.1: pyproject.toml pins it, since a seed's words are these lists'."""
    assert [len(wordlists.word_list(kind)) for kind in wordlists.WORDS] == [6782, 910, 1041]
    assert len(set(wordlists.all_words())) == len(wordlists.all_words())
    assert not [word for word in wordlists.all_words() if not word.strip()]


def test_essays(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text('One.\nTwo\nlines! "Three?" Four', encoding="utf-8")
    found = from_file(own)
    assert found.sentences == ("One.", "Two lines!", '"Three?"', "Four")
    assert found.tags == {"essay": "user", "text": "own.txt"}
    assert list(islice(found.endless(), 6))[4:] == ["One.", "Two lines!"]
    with pytest.raises(FileTrouble, match="cannot be read"):
        from_file(tmp_path / "none.txt")
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileTrouble, match="cannot be read as text"):
        from_file(own)
    with pytest.raises(MrropeError, match="nothing: no prose"):
        essay(" \n ", name="nothing")
    assert " ".join(prose().sentences) == PROSE


def test_public_domain_prose_is_tagged() -> None:
    found = public_domain("doctor-moreau")
    assert found.tags == {"essay": "pd", "text": "doctor-moreau"}
    (sample,) = ruler(Bytes(), "niah_single_2", 4000, n=1, essay=found)
    assert sample.tags == found.tags
    assert next(ruler(Bytes(), "niah_single_1", 4000, n=1, essay=found)).tags == {}


def test_pieces_do_not_gain_spaces() -> None:
    """Vocabularies that put a space before each text would put one before each piece."""
    assert read(Pieces(Spacing())("word")) == "word"
    assert read(Pieces(Spacing())(" word")) == " word"
    (sample,) = make(Spacing(), "niah_single_2", 4000, 1)
    assert "  " not in written(sample)
    within(sample, 4000)
