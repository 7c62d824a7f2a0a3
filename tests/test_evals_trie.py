"""Prompts evaluated along their trie: the bits of each alone, every shared token once, interruptions, memories."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.trie import Plan, Prompt, Result, cut, order, pieces, plan, run, shared
from mrrope_gguf.model import load
from tests import tiny

pytestmark = pytest.mark.engine

Rows = dict[int, Any]


def branches(seed: int = 0, n: int = 10, longest: int = 1100, work: bool = True) -> list[Prompt]:
    """Prompts that part from each other at any place, two of them the same, one another's beginning."""
    rng = random.Random(seed)
    trunk = tiny.tokens(longest, seed)
    texts = [trunk[: rng.randrange(longest)] + tiny.tokens(rng.choice([1, 2, 3, 70, 200]), i) for i in range(n)]
    texts += [trunk[:700], trunk[:700], trunk[:513]]
    rng.shuffle(texts)
    return [Prompt(tuple(t), tuple(tiny.tokens(5, i)) if work else (), 4 * work) for i, t in enumerate(texts)]


def evaluate(llm: Any, prompts: Sequence[Prompt], **how: Any) -> tuple[list[Result], Rows, list[tuple[int, int]]]:
    """Results, the logits after each prompt, and what progress said."""
    rows: Rows = {}
    said: list[tuple[int, int]] = []

    def keep(i: int, row: Any) -> None:
        rows[i] = row.copy()

    found = run(llm, prompts, on_logits=keep, progress=lambda done, total: said.append((done, total)), **how)
    return found, rows, said


def assert_same(llm: Any, prompts: Sequence[Prompt], **how: Any) -> list[tuple[int, int]]:
    """The trie's results and logits have the bits of each prompt alone; what its progress said."""
    alone, wanted, _ = evaluate(llm, prompts, share=False)
    found, rows, said = evaluate(llm, prompts, **how)
    assert found == alone
    assert [i for i in rows if rows[i].tobytes() != wanted[i].tobytes()] == []
    assert len({row.tobytes() for row in rows.values()}) > len(prompts) // 2  # they differ from one another
    return said


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from opened(tmp_path_factory.mktemp("trie"))


def opened(folder: Path, arch: str = "llama", settings: dict[str, Any] | None = None, **shape: Any) -> Iterator[Any]:
    path = tiny.make(folder / "m.gguf", arch, n_ctx=1536, **shape)
    model = load(path, **{"flash_attn": False, "n_threads": 1, "n_threads_batch": 1, **(settings or {})})
    yield model
    model.close()


# --- what is decoded ---------------------------------------------------------------------------------------------


def test_shared() -> None:
    rng = random.Random(1)
    for _ in range(300):
        a, b = ([rng.randrange(2) for _ in range(rng.randrange(9))] for _ in range(2))
        wanted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert shared(a, b) == wanted


@pytest.mark.parametrize("chunk", [512, 100, 32])
def test_a_cut_lies_where_rows_keep_their_bits(chunk: int) -> None:
    """In a shared token, a whole number of 64s into its piece, and with 64 rows to go unless the piece is whole."""
    for n_shared in range(0, 1200, 7):
        for n in range(n_shared + 1, 1400, 11):
            at = cut(n_shared, n, chunk)
            start, end = next((a, b) for a, b in pieces(0, n, chunk) if a <= at < b)
            assert start <= at <= n_shared
            assert (at - start) % 64 == 0
            assert at == start or end - at >= 64
            assert n_shared - at < 128 + chunk % 64 or end - at < 192
            assert cut(n_shared, n, chunk, exact=True) == n_shared // chunk * chunk


def test_pieces_are_those_of_the_prompt_alone() -> None:
    assert list(pieces(0, 1200)) == [(0, 512), (512, 1024), (1024, 1200)]
    assert list(pieces(576, 1200)) == [(576, 1024), (1024, 1200)]
    assert list(pieces(1200, 1200)) == []


def test_plan_counts_each_node_once() -> None:
    """A trunk of 1024, three branches at its end, another at 512, one of them twice."""
    trunk = tuple(tiny.tokens(1024))
    prompts = [Prompt((*trunk, *(k,) * 100)) for k in (3, 4, 5, 5)] + [Prompt((*trunk[:512], *(299,) * 100), (7, 8), 3)]
    assert plan(prompts) == Plan(trie=1024 + 300 + 100, naive=4 * 1124 + 612, continuation=1 + 2)
    assert plan(prompts).ratio == pytest.approx((5108 + 3) / (1424 + 3))
    assert plan([]) == Plan(0, 0, 0)
    walked = order(prompts)
    assert [prompts[i].tokens for i in walked] == sorted(p.tokens for p in prompts)


# --- the same bits -----------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"n_embd": 256, "n_layer": 1, "n_ff": 256}  # rows of 256: a block of the K-quants


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_K", "q6_K"])
def test_bits_of_every_type(tmp_path: Path, dtype: str) -> None:
    """One row, groups of four rows, and tiles of 64 have kernels of their own."""
    for llm in opened(tmp_path, dtype=dtype, **WIDE):
        assert_same(llm, branches())


@pytest.mark.parametrize("settings", [
    {"flash_attn": True}, {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}, {"n_threads_batch": 2},
    {"type_k": "f32", "type_v": "f32"}, {"n_batch": 100}, {"n_ubatch": 128}, {"n_ubatch": 24}, {"logits_all": True},
], ids=str)  # fmt: skip
def test_bits_under_other_settings(tmp_path: Path, settings: dict[str, Any]) -> None:
    for llm in opened(tmp_path, settings=settings, dtype="q4_K", **WIDE):
        assert_same(llm, branches(seed=1))


def test_alone_is_a_plain_pass_over_the_prompt(llm: Any) -> None:
    prompts = branches()
    _, rows, _ = evaluate(llm, prompts)
    for i, prompt in enumerate(prompts):
        with Decoder(llm) as decoder:
            (plain,) = decoder.logits(prompt.tokens, every=False)
            assert plain[0].tobytes() == rows[i].tobytes()


def test_bits_when_cut_at_whole_pieces(llm: Any) -> None:
    prompts = branches()
    said = assert_same(llm, prompts, exact=True)
    assert said[-1][1] <= plan(prompts, exact=True).trie + plan(prompts).continuation
    assert plan(prompts).trie < plan(prompts, exact=True).trie < plan(prompts).naive


def test_any_cut_would_not_do(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule is for: a piece of one row, as a cut wherever two prompts part would leave, has other bits."""
    trunk = tiny.tokens(400)
    prompts = [Prompt((*trunk, k)) for k in (3, 4, 5)]
    assert_same(llm, prompts)
    monkeypatch.setattr("mrrope_gguf.evals.trie.cut", lambda n_shared, *_: n_shared)
    (_, wanted, _), (_, rows, _) = evaluate(llm, prompts, share=False), evaluate(llm, prompts)
    assert [i for i in rows if rows[i].tobytes() != wanted[i].tobytes()] == order(prompts)[1:]
    assert max(np.abs(rows[i] - wanted[i]).max() for i in rows) < 1e-3


@pytest.mark.parametrize(("arch", "swa_full"), [("gemma3", True), ("gemma3", False), ("gemma2", True), ("llama", True)])
def test_sliding_windows(tmp_path: Path, arch: str, swa_full: bool) -> None:
    """A cache no larger than the window cannot be rolled back: each prompt alone, and the total says so."""
    for llm in opened(tmp_path, arch, {"swa_full": swa_full}):
        prompts = branches()
        done, total = assert_same(llm, prompts)[-1]
        assert done == total
        if swa_full:
            assert total <= plan(prompts).trie + plan(prompts).continuation
        else:
            assert total > plan(prompts).naive


@pytest.mark.real
def test_bits_on_a_real_model(smollm2: Path) -> None:
    model = load(smollm2, n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn=False)
    text = "A river rises in the hills and runs past two towns before it comes to the sea. " * 12
    trunk = model.tokenize(text.encode(), add_bos=True)[:220]
    ends = [" The first of them is called", " The second of them is called", " It was in the year of"]
    prompts = [
        Prompt((*trunk[:n], *model.tokenize(end.encode(), add_bos=False)), (330, 216), 3)
        for n in (90, 220) for end in ends
    ]  # fmt: skip
    assert_same(model, prompts)
    model.close()


# --- work and interruptions --------------------------------------------------------------------------------------


def test_progress_counts_what_was_planned(llm: Any) -> None:
    prompts = [Prompt(p.tokens, p.answer) for p in branches()]
    work = plan(prompts)
    _, _, said = evaluate(llm, prompts)
    assert said[-1] == (work.trie + work.continuation,) * 2
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert max(b[0] - a[0] for a, b in pairwise(said)) <= 512
    assert evaluate(llm, prompts, share=False)[2][-1] == (work.naive + work.continuation,) * 2


def test_a_run_goes_on_where_it_was_stopped(llm: Any) -> None:
    prompts = branches()
    whole = run(llm, prompts)
    kept: dict[int, Result] = {}

    def stop(i: int, result: Result) -> None:
        kept[i] = result
        if len(kept) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llm, prompts, on_result=stop)
    assert list(kept) == order(prompts)[:5]
    made: list[int] = []
    assert run(llm, prompts, done=kept, on_result=lambda i, _: made.append(i)) == whole
    assert made == order(prompts)[5:]
    assert run(llm, prompts, done=dict(enumerate(whole)), on_result=lambda i, _: made.clear()) == whole
    assert made


def test_texts_end(llm: Any) -> None:
    """After so many tokens, or when `stop` says so; what was not decoded leaves the total."""
    tokens = tuple(tiny.tokens(100))
    (free,) = run(llm, [Prompt(tokens, generate=9)])
    assert 0 < len(free.generated) <= 9
    seen: list[list[int]] = []

    def stop(so_far: Sequence[int]) -> bool:
        seen.append(list(so_far))
        return len(so_far) == 2

    stopped, _, said = evaluate(llm, [Prompt(tokens, generate=9, stop=stop)])
    assert stopped[0].generated == free.generated[:2]
    assert seen == [list(free.generated[:1]), list(free.generated[:2])]
    assert said[-1] == (101, 101)
    assert run(llm, [Prompt(tokens)]) == [Result((), ())]


def test_losses_are_those_of_the_answer(llm: Any) -> None:
    from mrrope_gguf.evals.losses import token_nll

    tokens, answer = tuple(tiny.tokens(600)), tuple(tiny.tokens(7, 1))
    (found,) = run(llm, [Prompt(tokens, answer)])
    assert found.losses == pytest.approx(token_nll(llm, tokens + answer)[-7:].tolist(), abs=1e-3)
    assert np.ptp(found.losses) > 0.1


def test_prompts_that_cannot_be_run(llm: Any) -> None:
    long = Prompt((5,) * 1530, generate=8)
    seen: list[int] = []
    with pytest.raises(EngineTrouble, match="prompt 1 does not fit") as caught:
        run(llm, [Prompt((5, 6)), long], progress=lambda *_: seen.append(1))
    assert "take 1537 with what follows, and the context has 1536" in str(caught.value)
    assert not seen
    assert len(run(llm, [Prompt((5,) * 1530, generate=7)])) == 1
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        run(llm, [Prompt(())])
    assert run(llm, []) == []
