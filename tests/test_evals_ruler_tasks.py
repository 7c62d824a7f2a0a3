"""Each of RULER's tasks against its definition: the template word for word, what is hidden, that it can be found."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import Refused
from mrrope_gguf.evals.ruler_niah import KINDS, niah
from mrrope_gguf.evals.ruler_tasks import ruler
from mrrope_gguf.evals.samples import Sample
from tests.eval_text import PROSE, Bytes, job, prose, read, written

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NIAH = sorted(KINDS)
NUMBER, WORD = "[1-9][0-9]{6}", "[A-Za-z' -]+-[A-Za-z' -]+"
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# keys of the haystack (None: as many as fit), values a key, keys asked for, what a key and a value look like, type
HIDDEN = {
    "niah_single_1": (1, 1, 1, WORD, NUMBER, "numbers"),
    "niah_single_2": (1, 1, 1, WORD, NUMBER, "numbers"),
    "niah_single_3": (1, 1, 1, WORD, UUID, "uuids"),
    "niah_multikey_1": (4, 1, 1, WORD, NUMBER, "numbers"),
    "niah_multikey_2": (None, 1, 1, WORD, NUMBER, "numbers"),
    "niah_multikey_3": (None, 1, 1, UUID, UUID, "uuids"),
    "niah_multivalue": (1, 4, 1, WORD, NUMBER, "numbers"),
    "niah_multiquery": (4, 1, 4, WORD, NUMBER, "numbers"),
}
NUMBERED = r"(\d+)\. (.*?)(?= \d+\. |$)"
DEPTHS = [round(100 * i / 39) for i in range(40)]


def sample(task: str, length: int = 6000, seed: int = 42) -> Sample:
    return next(ruler(Bytes(), task, length, n=1, seed=seed, essay=prose()))


def needles(text: str, task: str) -> list[tuple[str, str]]:
    """(key, value) of every needle in the text, in its order."""
    *_, key, value, type_ = HIDDEN[task]
    return re.findall(f"One of the special magic {type_} for ({key}) is: ({value})\\.", text)


def test_template_of_one_needle() -> None:
    found = sample("niah_single_1")
    ((key, value),) = needles(written(found), "niah_single_1")
    lines = written(found).split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert Counter(lines[1:-1]) == {
        NOISE: len(lines) - 3,
        f"One of the special magic numbers for {key} is: {value}.": 1,
    }
    assert read(found.answer_prefix) == f" The special magic number for {key} mentioned in the provided text is"


def test_template_of_many_values() -> None:
    found = sample("niah_multivalue")
    key = needles(written(found), "niah_multivalue")[0][0]
    lines = written(found).split("\n")
    assert len(lines) == 3
    assert lines[0] == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    assert lines[2] == (
        f"What are all the special magic numbers for {key} mentioned in the provided text? "
        f"The special magic numbers for {key} mentioned in the provided text are"
    )


def test_template_of_many_keys() -> None:
    found = sample("niah_multiquery")
    question = read(found.question)
    (asked,) = re.findall("for (.*) mentioned", question)
    first, second, third, last = re.split(", and |, ", asked)
    assert asked == f"{first}, {second}, {third}, and {last}"
    of_key = dict(needles(written(found), "niah_multiquery"))
    assert found.references == tuple(of_key[key] for key in (first, second, third, last))


def test_needles_stand_in_no_order() -> None:
    """The values of one key come in the order of the references in one haystack of 24, not in all."""
    orders = [needles(read(sample("niah_multivalue", 4000, seed).prefix), "niah_multivalue") for seed in range(12)]
    references = [sample("niah_multivalue", 4000, seed).references for seed in range(12)]
    assert [tuple(value for _, value in order) for order in orders] != references


@pytest.mark.parametrize("seed", [42, 43, 44])
@pytest.mark.parametrize("task", NIAH)
def test_needles(task: str, seed: int) -> None:
    """As many as the table says, no key and no value twice, and the question's answers are the references."""
    keys, values, queries, *_ = HIDDEN[task]
    found = sample(task, seed=seed)
    hay = read(found.prefix)
    hidden = needles(hay, task)
    if keys is None:
        assert len(hidden) == hay.count("One of the special magic") == len(hay.split("\n")) - 1 > 30
    else:
        assert len(hidden) == hay.count("special magic") - 1 == keys * values
    assert len({value for _, value in hidden}) == len(hidden)
    assert len({key for key, _ in hidden}) == len(hidden) // values
    asked = read(found.question)
    wanted = [value for key, value in hidden if re.search(rf"(for|,|and) {re.escape(key)}(,| mentioned)", asked)]
    assert sorted(wanted) == sorted(found.references)
    assert len(wanted) == values * queries
    assert all(hay.count(reference) == 1 for reference in found.references)


@pytest.mark.parametrize("task", NIAH)
def test_positions_are_the_answers_needles(task: str) -> None:
    found = sample(task)
    starts = [read(found.tokens[at:]).lstrip()[:300] for at in found.positions]
    said = [needles(start, task)[0] for start in starts]
    assert all(start.startswith("One of the special magic") for start in starts)
    assert sorted(value for _, value in said) == sorted(found.references)
    assert list(found.positions) == sorted(found.positions)


@pytest.mark.parametrize("task", [name for name in NIAH if KINDS[name].haystack == "essay"])
@pytest.mark.parametrize("seed", range(40, 60))
def test_essays_take_needles_between_sentences(task: str, seed: int) -> None:
    """At depths of RULER's 40; nothing of the essay is lost but its end."""
    found = sample(task, 3500, seed)
    context = read(found.prefix).split("\n")[1]
    parts = re.split(r" ?One of the special magic \w+ for [^.]*?\.", context)
    left = "".join(parts)
    assert f"{PROSE} {PROSE} {PROSE} {PROSE}".startswith(left.lstrip())
    allowed = {int(sentences(left) * depth / 100) for depth in DEPTHS}
    assert {sentences("".join(parts[: i + 1])) for i in range(len(parts) - 1)} <= allowed
    assert not re.search(r"[.][A-Z]", context)


def sentences(text: str) -> int:
    """The essay's sentences in a text, the last of which may be cut."""
    return len(re.split(r"(?<=[.]) ", text.strip())) if text.strip() else 0


@pytest.mark.parametrize(("depth", "share"), [(0, 0.0), (25, 0.25), (50, 0.5), (100, 1.0)])
@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_a_depth_that_is_asked_for(task: str, depth: int, share: float) -> None:
    kind = KINDS[task]
    found = niah(job(Bytes(), task, 6000, 128), kind, prose(), depth=depth)
    context = read(found.prefix).split("afterwards.", 1)[1]
    at = context.index(found.references[0])
    assert at / len(context) == pytest.approx(share, abs=0.04)
    assert found.n_prompt + 128 <= 6000


def test_depths_of_noise_reach_from_end_to_end() -> None:
    found = [sample("niah_single_1", 4000, seed) for seed in range(100)]
    depths = [each.positions[0] / len(each.prefix) for each in found]
    assert min(depths) < 0.12
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / 100 < 0.6


def chain(text: str) -> tuple[str, list[str]]:
    """The value first assigned, and the names that carry it, followed line by line."""
    (first, value) = re.findall(r"\nVAR ([A-Z]+) = (\d+)\n", text)[0]
    names = [first]
    for name, source in re.findall(r"\nVAR ([A-Z]+) = VAR ([A-Z]+) (?=\n)", text):
        assert source == names[-1]
        names.append(name)
    return value, names


@pytest.mark.parametrize("seed", [42, 43, 44, 45])
def test_vt(seed: int) -> None:
    found = sample("vt", seed=seed)
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, example, task = written(found).split(intro)
    value, names = chain("\n" + task)
    assert empty == ""
    assert names == list(found.references)
    assert len(names) == len(set(names)) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
    end = (
        "\nQuestion: Find all variables that are assigned the value {0} in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value {0}, they are: "
    )
    assert task.endswith(end.format(value))
    lines = task.removesuffix(end.format(value)).split("\n")
    assert Counter(line.startswith("VAR ") for line in lines) == {True: 5, False: len(lines) - 5}
    assert {line for line in lines if not line.startswith("VAR ")} == {NOISE}
    solved, short = chain("\n" + example)
    assert example.endswith(end.format(solved) + " " + " ".join(short) + "\n\n")
    assert all(re.fullmatch("[A-Z]{3}", name) for name in short)
    for at, name in zip(found.positions, names, strict=True):
        assert read(found.tokens[at:]).startswith(f"\nVAR {name} = ")


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(4095, 6, 1, (3, 1)), (8000, 30, 3, (10, 3))])
def test_cwe(length: int, often: int, seldom: int, shown: tuple[int, int]) -> None:
    """Below 4096 tokens 6 times and once, from there on 30 times and 3 times; the example 3 and 1, 10 and 3."""
    found = sample("cwe", length)
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    end = (
        "\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )
    empty, example, task = written(found).split(intro)
    counts = listed(task.removesuffix(end))
    assert empty == ""
    assert task.endswith(end)
    assert counts == {word: often if word in found.references else seldom for word in counts}
    assert set(found.references) < set(counts)
    assert len(found.references) == 10
    text, answers = example.split(end)
    solved = listed(text)
    common = [word for word, _ in solved.most_common(10)]
    assert sorted(listed(answers.removeprefix(" ").removesuffix("\n"))) == sorted(common)
    assert sorted(set(solved.values())) == sorted(shown)
    assert len(solved) == (20 if length < 4096 else 40)
    assert not set(solved) & set(counts)
    words = [word for _, word in re.findall(NUMBERED, task.removesuffix(end))]
    assert sum(a == b for a, b in pairwise(words)) < 0.1 * len(words)  # shuffled


def listed(text: str) -> Counter[str]:
    """The words of `1. word 2. word ...`, whose numbers must rise by one."""
    found = re.findall(NUMBERED, text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    assert " ".join(f"{number}. {word}" for number, word in found) == text
    return Counter(word for _, word in found)


@pytest.mark.parametrize("length", [2000, 5000, 20000])
def test_fwe(length: int) -> None:
    """Rank k comes n / (k^2 zeta(2)) times, of a vocabulary of length // 50 words; the first is dots."""
    found = sample("fwe", length)
    text = written(found)
    intro = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    end = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text? "
        "Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert text.startswith(intro)
    assert text.endswith(end)
    words = text.removeprefix(intro).removesuffix(end).split(" ")
    counts = Counter(words).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == found.references
    assert counts[3][1] > counts[4][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    # each rank is rounded down: the n behind the first four lies between these
    least = max(count * rank**2 * math.pi**2 / 6 for rank, (_, count) in enumerate(counts[:4], 1))
    most = min((count + 1) * rank**2 * math.pi**2 / 6 for rank, (_, count) in enumerate(counts[:4], 1))
    assert least < most
    assert sum(int(least / rank**2 * 6 / math.pi**2 + 1e-9) for rank in range(1, length // 50 + 1)) <= len(words)
    assert len(counts) <= length // 50
    assert words[: counts[0][1]].count("...") < 0.8 * counts[0][1]  # shuffled, not rank by rank


def test_fwe_is_never_undecided() -> None:
    """Rounding gives ranks 4 and 5 the same count at some lengths: those are refused."""
    refused = []
    for length in range(560, 1200, 4):
        try:
            words = read(sample("fwe", length).prefix).split("words. ")[1].split(" ")
        except Refused:
            refused.append(length)
        else:
            (*_, (_, fourth), (_, fifth)) = [*Counter(words).most_common(5), ("", 0)][:5]
            assert fourth > fifth
    assert 0 < len(refused) < 160
    assert refused != [*range(560, refused[-1] + 1, 4)]  # not only the shortest


@pytest.mark.engine
@pytest.mark.real
def test_fwe_has_a_word_for_50_tokens(smollm2: Path) -> None:
    """In short texts every word of the vocabulary comes up."""
    import llama_cpp

    llm: Any = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    for length in (400, 449, 450):
        found = next(ruler(llm, "fwe", length, n=1))
        assert len(set(read(found.prefix, llm).split("coded words. ")[1].split(" "))) == length // 50
    llm.close()
