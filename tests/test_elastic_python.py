"""load(elastic=, on_stage=): what a llama_cpp.Llama does, says and refuses; and models without a cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf import load
from mrrope_gguf.engine import ElasticState, get_elastic, set_elastic, set_elastic_policy
from mrrope_gguf.errors import EngineTrouble, Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.model import prefill
from mrrope_gguf.watch import StageChange
from tests import tiny
from tests.elastic import FULL, HEAD_ROOM, ORIG, STEP, Policy, grow_file, with_keys
from tests.engine_models import model
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(250)
POLICY = Policy(cache="f16")


def opened(path: Path, **options: Any) -> tuple[Any, list[StageChange]]:
    """A model by the policy of these tests, and the list that its stage changes go to."""
    changes: list[StageChange] = []
    llm = load(path, on_stage=changes.append, n_threads=1, n_threads_batch=1, **options)
    set_elastic_policy(llm, step=STEP, head_room=HEAD_ROOM)
    return llm, changes


def states(path: Path) -> list[ElasticState]:
    """Right after load, for each value of elastic."""
    found = []
    for elastic in (None, True, False):
        llm = load(path, elastic=elastic)
        found.append(get_elastic(llm))
        llm.close()
    return found


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("rendering", ["portable", "engine"])
def test_load_does_what_the_file_or_the_caller_says(engine: Worker, tmp_path: Path, rendering: Any, said: bool) -> None:
    path = extend(model(tmp_path, "llama"), tmp_path / "out.gguf", scale=4, rendering=rendering, elastic=said).path
    on = ElasticState(True, 1.0, "mrrope-uni", FULL)
    off = ElasticState(False, FULL, "mrrope-uni", FULL)
    assert engine.call(states, path) == [on if said else off, on, off]


def complained(path: Path, **options: Any) -> tuple[str, str, str, list[str]]:
    """The error's kind, text and fix, if load raises one; and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load(path, **options).close()
        except (Refused, EngineTrouble) as err:
            return type(err).__name__, str(err), err.fix, [str(w.message) for w in caught]
    return "", "", "", [str(w.message) for w in caught if w.category is UserWarning]


def test_what_cannot_be_elastic_is_refused(engine: Worker, tmp_path: Path) -> None:
    source = model(tmp_path, "llama")
    kind, text, fix, _ = engine.call(complained, source, elastic=True)
    assert (kind, "no table to grow to" in text, "extend" in fix) == ("Refused", True, True)
    for name in ("maincoder", "qwen2vl"):
        _, path = with_keys(tmp_path / "", name)
        kind, text, _, _ = engine.call(complained, path, elastic=True)
        assert (kind, "elastic" in text) == ("Refused", True)
        assert engine.call(complained, path)[0] == ""
        assert engine.call(complained, path, elastic=False)[0] == ""


def test_on_stock(stock: Worker, engine: Worker, tmp_path: Path) -> None:
    done = grow_file(tmp_path, "llama", "portable")
    kind, _, _, said = stock.call(complained, done.path)
    assert kind == ""
    assert len(said) == 1
    assert "mrrope-pro table is static here" in said[0]
    assert "elastic=False" in said[0]
    assert stock.call(complained, done.path, elastic=False) == ("", "", "", [])
    assert stock.call(complained, done.source) == ("", "", "", [])
    assert engine.call(complained, done.path) == ("", "", "", [])
    for path in (done.path, done.source):
        kind, text, fix, _ = stock.call(complained, path, elastic=True)
        assert kind == "EngineTrouble"
        assert "elastic=True needs the patched engine" in text
        assert "MRROPE_ENGINE" in fix or "mrrope build" in fix


def test_a_static_portable_file_is_no_news_on_stock(stock: Worker, tmp_path: Path) -> None:
    path = extend(model(tmp_path, "llama"), tmp_path / "out.gguf", scale=4, rendering="portable", elastic=False).path
    assert stock.call(complained, path) == ("", "", "", [])


def by_name(path: Path) -> tuple[list[ElasticState], list[StageChange]]:
    llm, changes = opened(path, n_ctx=256, rope_scaling_type="mrrope-pro", elastic=True)
    found = [get_elastic(llm)]
    prefill(llm, TOKENS)
    found.append(get_elastic(llm))
    llm.close()
    return found, changes


def test_a_file_that_was_not_extended(engine: Worker, tmp_path: Path) -> None:
    (before, after), changes = engine.call(by_name, model(tmp_path, "llama"))
    assert before == ElasticState(True, 1.0, "mrrope-pro", FULL)
    assert after == ElasticState(True, FULL, "mrrope-pro", FULL)
    assert changes == [StageChange(250, 1.0, FULL)]


def expected(lengths: list[int]) -> list[StageChange]:
    """The changes that a text whose length goes through these makes."""
    scales = [float(np.float32(POLICY.scale_at(n))) for n in lengths]
    pairs = zip(lengths, [1.0, *scales], scales, strict=False)
    return [StageChange(n, before, after) for n, before, after in pairs if before != after]


def told(path: Path, how: str) -> tuple[list[StageChange], list[int]]:
    """The changes that were told while a text of 250 tokens grew, and the lengths it had after each decode."""
    llm, changes = opened(path, n_batch=32)
    if how == "prefill":
        prefill(llm, TOKENS)
        lengths = [*range(32, 250, 32), 250]
    elif how == "eval":
        for token in TOKENS:
            llm.eval([token])
        lengths = list(range(1, 251))
    else:
        llm.create_completion(TOKENS[:50], max_tokens=150, temperature=0.0, logit_bias={2: -100.0})
        lengths = [32, 50, *range(51, llm.n_tokens + 1)]
    llm.close()
    return changes, lengths


@pytest.mark.parametrize("how", ["prefill", "eval", "completion"])
def test_each_change_is_told_once(engine: Worker, tmp_path: Path, how: str) -> None:
    changes, lengths = engine.call(told, grow_file(tmp_path, "llama").path, how)
    assert changes == expected(lengths)
    assert len(changes) >= 3


def again(path: Path) -> tuple[list[StageChange], list[StageChange], float]:
    """What is told when a second prompt shares 20 tokens with a long one, and its S; then of the long one again."""
    llm, changes = opened(path)
    prefill(llm, TOKENS)
    changes.clear()
    llm.create_completion(TOKENS[:20] + TOKENS[100:110], max_tokens=1, temperature=0.0)
    back, scale = list(changes), get_elastic(llm).scale
    changes.clear()
    llm.create_completion(TOKENS, max_tokens=1, temperature=0.0)
    llm.close()
    return back, list(changes), scale


def test_a_prompt_that_shares_a_prefix_goes_back(engine: Worker, tmp_path: Path) -> None:
    back, there, scale = engine.call(again, grow_file(tmp_path, "llama").path)
    assert back == [StageChange(30, FULL, 1.0)]
    assert scale == 1.0
    assert there == [StageChange(250, 1.0, FULL)]


def quiet(path: Path) -> list[StageChange]:
    """What is told of a static table, and after a switch between decodes."""
    llm, changes = opened(path, elastic=False)
    prefill(llm, TOKENS[:100])
    assert changes == []
    set_elastic(llm, True)
    prefill(llm, TOKENS[100:130])
    llm.close()
    return changes


def test_a_switch_is_the_callers_own_news(engine: Worker, tmp_path: Path) -> None:
    before, after = (float(np.float32(POLICY.scale_at(n))) for n in (100, 130))
    assert before < after
    assert engine.call(quiet, grow_file(tmp_path, "llama").path) == [StageChange(130, before, after)]


def kept(path: Path) -> tuple[list[int], list[int], list[float]]:
    """Greedy tokens after a saved state, without and with it; S when it is saved, loaded and at the end of both."""
    llm, _ = opened(path)
    prefill(llm, TOKENS[:150])
    scales, state = [get_elastic(llm).scale], llm.save_state()
    first = greedy(llm)
    scales.append(get_elastic(llm).scale)
    llm.close()
    llm, changes = opened(path)
    llm.load_state(state)
    scales.append(get_elastic(llm).scale)
    second = greedy(llm)
    scales.append(get_elastic(llm).scale)
    assert [change.before for change in changes][:1] == scales[2:3]
    llm.close()
    return first, second, scales


def greedy(llm: Any, n: int = 80) -> list[int]:
    found: list[int] = []
    row = llm.scores[llm.n_tokens - 1]
    for _ in range(n):
        found.append(int(np.argmax(row)))
        llm.eval(found[-1:])
        row = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
    return found


def test_save_state_and_load_state(engine: Worker, tmp_path: Path) -> None:
    first, second, scales = engine.call(kept, grow_file(tmp_path, "llama").path)
    assert first == second
    stage, last = (float(np.float32(POLICY.scale_at(n))) for n in (150, 230))
    assert scales == [stage, last, stage, last]
    assert stage < last


@dataclass(frozen=True)
class Embedded:
    """One text: its embedding (n_tokens, n_embd) or (n_embd,), S after it, and what was told."""

    n_tokens: int
    values: Floats
    scale: float
    told: list[StageChange]


# each character is a token of its own
TEXTS = [("0123456789" * 30)[:n] for n in (20, 30, 150, 240, 70, 30)]


def embedded(path: Path, **options: Any) -> list[Embedded]:
    found: list[Embedded] = []
    llm, changes = opened(path, embedding=True, **options)
    for text in TEXTS:
        changes.clear()
        values = np.array(llm.embed(text, normalize=False), np.float32)
        found.append(Embedded(len(llm.tokenize(text.encode())), values, get_elastic(llm).scale, list(changes)))
    llm.close()
    return found


def plain(path: Path) -> list[Floats]:
    """The same of a file that was not extended, on any library."""
    llm = load(path, embedding=True, n_ctx=512, past_window=True, n_threads=1, n_threads_batch=1)
    found = [np.array(llm.embed(text, normalize=False), np.float32) for text in TEXTS]
    llm.close()
    return found


@pytest.mark.parametrize("name", ["eurobert", "llama"])
def test_embeddings(engine: Worker, stock: Worker, tmp_path: Path, name: str) -> None:
    source = tiny.make(tmp_path / "in.gguf", name, n_ctx=ORIG)
    path = extend(source, tmp_path / "out.gguf", scale=4, rendering="engine").path
    grown, full, original = (
        engine.call(embedded, path),
        engine.call(embedded, path, elastic=False),
        stock.call(plain, source),
    )
    before = 1.0
    for text, static, first in zip(grown, full, original, strict=True):
        assert text.scale == np.float32(POLICY.scale_at(text.n_tokens))
        assert text.told == [StageChange(text.n_tokens, before, text.scale)] * (before != text.scale)
        # a text inside the window is the original's, whatever came before it
        assert (text.values == first).all() == (text.scale == 1.0)
        # without a cache there are no stages on the way, only the table for the text's length
        assert (text.values == static.values).all() == (text.scale == FULL and name == "eurobert")
        before = text.scale
    assert len({text.scale for text in grown}) == 4
