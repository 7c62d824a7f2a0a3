"""llama_rope_elastic_reserve: the stage of a prompt that is known to be long, from its first token on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf.engine import get_elastic, get_table, reserve_elastic, set_elastic, set_factors
from mrrope_gguf.errors import Refused
from tests import tiny
from tests.elastic import FINE, FULL, ORIG, Held, elastic, grow_file, scale_of, scratch
from tests.engine_session import rel_rms, session
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from tests.engine_session import Floats

pytestmark = pytest.mark.engine

TOKENS = tiny.tokens(300)
LONG = 150
BROAD: dict[str, Any] = {"head_dim": 32, "n_embd": 128}


def stage(n: int) -> float:
    return float(np.float32(FINE.scale_at(n)))


def at_once(path: Path, n: int) -> tuple[list[float], Floats, Floats]:
    """S while a prompt of n tokens comes in under its reserve; its logits, and those under that stage's table."""
    with elastic(path, FINE) as s:
        reserve_elastic(s.ctx, n)
        found, rows = [scale_of(s)], []
        for at in range(0, n, 25):
            rows.append(s.feed(TOKENS[at : min(at + 25, n)]))
            found.append(scale_of(s))
        table = get_table(s.ctx)
    with session(path, n_ctx=512) as s:
        assert table is not None
        set_factors(s.ctx, table.factors, table.attn_factor)
        wanted = np.concatenate([s.feed(TOKENS[at : min(at + 25, n)]) for at in range(0, n, 25)])
    return found, np.concatenate(rows), wanted


@pytest.mark.parametrize("n", [65, 120, 200, 300])
def test_a_prompt_comes_in_under_one_table(engine: Worker, tmp_path: Path, n: int) -> None:
    found, rows, wanted = engine.call(at_once, grow_file(tmp_path, "llama", n_layer=2).path, n)
    assert found == [1.0] + [stage(n)] * (len(found) - 1)
    assert (rows == wanted).all()


def come_and_gone(path: Path) -> tuple[list[tuple[str, float]], list[float]]:
    """S at each step of a conversation in which a reserve comes, is outgrown, and goes; the keys' errors."""
    found: list[tuple[str, float]] = []
    wrong: list[float] = []
    with elastic(path, FINE) as s:

        def look(what: str) -> None:
            held: Held = dict(enumerate(TOKENS[: s.next()]))
            found.append((what, scale_of(s)))
            wrong.append(rel_rms(s.keys()[0].values, scratch(path, get_table(s.ctx), held, "f32")))

        def feed(n: int, what: str) -> None:
            s.feed(TOKENS[s.next() : n])
            look(what)

        feed(20, "20")
        reserve_elastic(s.ctx, 150)
        look("20")
        feed(30, "150")
        feed(140, "150")
        feed(160, "160")
        s.remove(0, 25)
        feed(26, "150")
        state = s.state(0)
        reserve_elastic(s.ctx, 0)
        feed(27, "27")
        s.clear()
        assert s.restore(state, 0) == len(state)
        look("26")
        reserve_elastic(s.ctx, 1000)
        feed(28, "full")
        set_elastic(s.ctx, False)
        reserve_elastic(s.ctx, 0)
        set_elastic(s.ctx, True)
        look("28")
    return found, wrong


def test_it_comes_and_goes_at_the_next_decode(engine: Worker, tmp_path: Path) -> None:
    found, wrong = engine.call(come_and_gone, grow_file(tmp_path, "llama", **BROAD).path)
    for what, scale in found:
        assert scale == (FULL if what == "full" else stage(int(what))), found
    assert max(wrong) < 1e-4


def scales(path: Path, n_reserved: int) -> list[float]:
    """S after one token, past two stages, at LONG, past it, emptied, and emptied with nothing reserved."""
    found = []
    with elastic(path, FINE) as s:
        reserve_elastic(s.ctx, n_reserved)
        for n in (1, 100, LONG, 200):
            s.feed(TOKENS[s.next() : n])
            found.append(scale_of(s))
        for reserved in (n_reserved, 0):
            s.clear()
            reserve_elastic(s.ctx, reserved)
            s.feed(TOKENS[:1])
            found.append(scale_of(s))
    return found


@pytest.mark.parametrize("n_reserved", [0, 1, ORIG, ORIG + 1, LONG])
def test_never_under_the_stage_of_the_length(engine: Worker, tmp_path: Path, n_reserved: int) -> None:
    found = engine.call(scales, grow_file(tmp_path, "llama").path, n_reserved)
    assert found == [stage(max(n, n_reserved)) for n in (1, 100, LONG, 200, 1)] + [1.0]


def inside(path: Path, reserved: int) -> Floats:
    with elastic(path, FINE) as s:
        if reserved:
            reserve_elastic(s.ctx, reserved)
        return s.feed(TOKENS[:ORIG])


def test_a_reserve_inside_the_window_is_none(engine: Worker, tmp_path: Path) -> None:
    path = grow_file(tmp_path, "llama", n_layer=2).path
    plain = engine.call(inside, path, 0)
    assert (engine.call(inside, path, ORIG) == plain).all()
    assert (engine.call(inside, path, ORIG + 1) != plain).any()


def refusals(path: Path) -> list[str]:
    """What is said of a negative length, and of one in a static context, which takes 0."""
    said = []
    with elastic(path) as s:
        for n_pos, on in ((-1, True), (100, False)):
            set_elastic(s.ctx, on)
            before = get_elastic(s.ctx)
            with pytest.raises(Refused) as caught:
                reserve_elastic(s.ctx, n_pos)
            said.append(str(caught.value))
            assert get_elastic(s.ctx) == before
        reserve_elastic(s.ctx, 0)
    return said


def test_what_it_refuses(engine: Worker, tmp_path: Path) -> None:
    negative, static = engine.call(refusals, grow_file(tmp_path, "llama").path)
    assert "-1" in negative
    assert "elastic" in static


def over_the_stage(path: Path) -> tuple[Floats, Floats, float]:
    """Logits of one batch that runs past what was reserved, and of the same cut there by hand."""
    rows = []
    with elastic(path, FINE) as s:
        for cuts in ((0, 200), (0, next(b for b in FINE.bounds() if b >= 100), 200)):
            s.clear()
            reserve_elastic(s.ctx, 100)
            rows.append(np.concatenate([s.feed(TOKENS[a:b]) for a, b in pairwise(cuts)]))
        return rows[0][:100], rows[1][:100], scale_of(s)


def test_growth_goes_on_from_there(engine: Worker, tmp_path: Path) -> None:
    found, wanted, scale = engine.call(over_the_stage, grow_file(tmp_path, "llama", n_layer=2).path)
    assert (found == wanted).all()
    assert scale == stage(200)
