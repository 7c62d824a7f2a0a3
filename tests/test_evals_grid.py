"""Grids whose prompts share their beginnings: the needle's place, every length in its budget, and the work saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mrrope_gguf.errors import Refused
from mrrope_gguf.evals.grid import Cell, needle_grid
from mrrope_gguf.evals.needles import INTRO, NEEDLE, NOISE, QUESTION, haystack
from mrrope_gguf.evals.passes import TaskPass
from mrrope_gguf.evals.retrieval import retrieval
from mrrope_gguf.evals.tasks import sample_items
from mrrope_gguf.evals.trie import Prompt, plan, run, shared
from mrrope_gguf.model import load
from tests import tiny
from tests.eval_text import Bytes

pytestmark = pytest.mark.engine

DEPTHS = [i / 10 for i in range(11)]
PROSE = "".join(f"The {n}th of the stones lay {n * 7} paces\n from the wall. Was it {n}? " for n in range(900))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = load(tiny.make(tmp_path_factory.mktemp("grid") / "m.gguf", n_ctx=4096), flash_attn=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def words(smollm2: Path) -> Iterator[Any]:
    """SmolLM2's tokenizer, without its weights."""
    model = load(smollm2, vocab_only=True)
    yield model
    model.close()


def text(llm: Any, tokens: tuple[int, ...]) -> str:
    return str(llm.detokenize(list(tokens)).decode()).strip()


def questions(llm: Any, length: int, n: int) -> list[Prompt]:
    """`n` questions on one JSON object, as a suite puts them."""
    task = TaskPass("retrieval/kv", "", (length,), (), 42, 1, length)
    return [item.prompt for item in sample_items(llm, task, retrieval(llm, "kv", length, n=1, questions=n))]


def parts(llm: Any, cell: Cell) -> tuple[str, str]:
    """The haystack before the needle and after it, without question and introduction."""
    whole, needle = text(llm, cell.tokens), NEEDLE.format(key=cell.key, value=cell.value)
    assert whole.startswith(INTRO)
    assert whole.endswith(QUESTION.format(key=cell.key))
    assert whole.count(needle) == 1
    assert text(llm, cell.tokens[cell.position :]).startswith(needle)
    before, after = whole.removeprefix(INTRO).removesuffix(QUESTION.format(key=cell.key)).split(needle)
    return before.strip(), after.strip()


@pytest.mark.parametrize("prose", [None, PROSE], ids=["noise", "prose"])
def test_needles_lie_at_a_sentence_end(llm: Any, prose: str | None) -> None:
    cells = needle_grid(llm, [1000, 2000], DEPTHS, prose=prose)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (1000, 2000) for d in DEPTHS]
    source = " ".join(((NOISE + " ") * 100 if prose is None else prose).split())
    for cell in cells:
        before, after = parts(llm, cell)
        assert source.startswith(f"{before} {after}".strip())
        assert all(part[-1] in ".?" for part in (before, after) if part)
        # counted in characters, where the grid counts tokens
        assert -0.01 <= cell.depth - len(before) / len(f"{before} {after}") < 0.08
        assert cell.length - 90 < len(cell.tokens) + len(cell.answer) <= cell.length
    assert [not parts(llm, c)[0] for c in cells[:11]] == [True] + [False] * 10
    assert [not parts(llm, c)[1] for c in cells[:11]] == [False] * 10 + [True]


def test_what_follows_is_within_the_length(llm: Any) -> None:
    (short,) = needle_grid(llm, [1000], [0.5], generate=128)
    assert 800 < len(short.tokens) <= 1000 - 128
    assert short.prompt(128).n_ctx <= 1000
    assert short.prompt(128).answer == short.answer
    assert text(llm, short.answer) == short.value


def test_a_sentence_is_tokenised_once_for_all_lengths_and_seeds() -> None:
    class Counting(Bytes):
        metadata: ClassVar[dict[str, str]] = {}

        def __init__(self) -> None:
            self.read: Counter[bytes] = Counter()

        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
            self.read[text] += 1
            return super().tokenize(text, add_bos, special)

    llm = Counting()
    for seed in (1, 2):
        cells = needle_grid(llm, [2000, 4000], [0.5], prose=PROSE, seed=seed)
        haystack(llm, 3000, ("amber",), seed, PROSE)
        assert cells[0].tokens[: cells[0].position] == cells[1].tokens[: cells[0].position]
    sentences = {text: n for text, n in llm.read.items() if b"of the stones lay" in text}
    assert len(sentences) > 50
    assert set(sentences.values()) == {1}


def test_every_cell_has_a_needle_of_its_own(llm: Any) -> None:
    cells = needle_grid(llm, [1000, 2000], DEPTHS)
    assert len({c.value for c in cells}) == len(cells)
    assert len({c.key for c in cells}) > 3
    assert needle_grid(llm, [2000], [0.3])[0] == cells[11 + 3]
    assert needle_grid(llm, [2000], [0.3], seed=1)[0].value != cells[11 + 3].value


def test_two_cells_share_what_stands_before_the_first_needle(llm: Any) -> None:
    cells = needle_grid(llm, [1000, 2000], DEPTHS, prose=PROSE)
    for a in cells:
        for b in cells:
            if a.position != b.position:
                common = min(a.position, b.position)
                assert common <= shared(a.tokens, b.tokens) <= common + 3


def test_grids_that_cannot_be(llm: Any) -> None:
    with pytest.raises(ValueError, match="a depth lies between 0 and 1, got 50"):
        needle_grid(llm, [1000], [0, 50])
    with pytest.raises(ValueError, match="300 tokens have no room for a needle"):
        needle_grid(llm, [2000, 300], [0.5])
    with pytest.raises(ValueError, match=r"the prose is too short for a haystack of \d+ tokens: it has \d+"):
        needle_grid(llm, [2000], [0.5], prose="One. Two. Three.")
    with pytest.raises(Refused, match="kv: does not fit in 2000 tokens"):
        questions(llm, 2000, 30)
    assert needle_grid(llm, [], DEPTHS) == []


def test_questions_on_one_object(llm: Any) -> None:
    prompts = questions(llm, 4000, 20)
    asked = set()
    for prompt in prompts:
        whole = text(llm, prompt.tokens)
        body, question = whole[whole.index("{") :].split("\n\n")
        pairs, key = json.loads(body), question.split('"')[1]
        assert text(llm, prompt.answer) == pairs[key]
        assert 3850 < prompt.n_ctx <= 4000
        asked.add(list(pairs).index(key))
    assert len(asked) == 20
    assert max(asked) - min(asked) > 0.8 * len(pairs)
    assert questions(llm, 4000, 20) == prompts


# --- the work saved ----------------------------------------------------------------------------------------------


def test_a_grid_on_a_model(llm: Any) -> None:
    cells = needle_grid(llm, [700, 1400], [0, 0.5, 1])
    done: list[int] = []
    results = run(llm, [c.prompt(3) for c in cells], progress=lambda at, total: done.append(at))
    assert [len(r.losses) for r in results] == [len(c.answer) for c in cells]
    work = plan([c.prompt(3) for c in cells])
    assert done[-1] <= work.trie + work.continuation < 0.8 * work.naive


@pytest.mark.real
def test_six_lengths_and_eleven_depths(words: Any) -> None:
    """4K to 128K, RULER's 128 tokens of text included: at least 1.6 times less work; key-value retrieval 8 times."""
    lengths = [4096 << i for i in range(6)]
    prompts = [c.prompt(128) for c in needle_grid(words, lengths, DEPTHS, generate=128)]
    assert sum(len(p.tokens) for p in prompts) > 0.97 * 11 * sum(lengths)
    assert plan(prompts).ratio >= 1.6
    assert plan([c.prompt(128) for c in needle_grid(words, lengths[:1], DEPTHS, generate=128)]).ratio >= 1.4


@pytest.mark.real
@pytest.mark.parametrize("length", [4096, 16384])
def test_twenty_questions_on_one_object(words: Any, length: int) -> None:
    prompts = questions(words, length, 20)
    assert len({p.tokens for p in prompts}) == 20
    assert plan(prompts).ratio >= 8
