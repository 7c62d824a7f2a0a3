"""The measurements, on a tiny model: losses equal a numpy forward pass, needles lie where they are said to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf import evals
from mrrope_gguf.errors import EngineTrouble, Refused
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.essay import essay
from mrrope_gguf.evals.losses import buckets, perplexity, token_nll
from mrrope_gguf.evals.needles import NEEDLE, ROOM, ask, haystack
from mrrope_gguf.model import load
from tests import tiny
from tests.forward import forward

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("evals") / "m.gguf", n_ctx=8192)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[Any]:
    model = load(path, n_batch=64, type_k="f32", type_v="f32", flash_attn=False)
    yield model
    model.close()


def test_losses_equal_a_forward_pass(path: Path, llm: Any) -> None:
    """200 tokens in chunks of 64: every chunk's rows are in their place."""
    tokens = np.random.default_rng(0).integers(3, 259, 200).tolist()
    logits = forward(path, tokens, [1.0] * 8, 1.0).astype(np.float64)
    wanted = np.log(np.exp(logits).sum(1))[:-1] - logits[np.arange(199), tokens[1:]]
    seen: list[tuple[int, int]] = []
    found = token_nll(llm, tokens, lambda done, total: seen.append((done, total)))
    assert np.abs(found - wanted).max() < 1e-3
    assert seen == [(64, 199), (128, 199), (192, 199), (199, 199)]
    assert np.abs(token_nll(llm, tokens) - found).max() < 1e-6


def test_rewind_forgets(llm: Any) -> None:
    with Decoder(llm) as decoder:
        (first,) = decoder.logits([5, 6, 7], every=False)
        wanted = first.copy()
        decoder.rewind(1)
        list(decoder.logits([9, 9, 9, 9]))
        decoder.rewind(1)
        (again,) = decoder.logits([6, 7], every=False)
        assert np.abs(again - wanted).max() < 1e-4


def test_more_tokens_than_context_are_refused_before_any_is_read(llm: Any) -> None:
    with Decoder(llm) as decoder, pytest.raises(EngineTrouble, match="8193 tokens do not fit"):
        next(decoder.logits([5] * 8193))


def test_one_token_has_no_loss(llm: Any) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        token_nll(llm, [5])


def test_perplexity_and_buckets() -> None:
    losses = np.log(np.array([2, 2, 2, 8, 8, 8, 4], dtype=np.float32))
    assert perplexity(losses, 0, 3) == pytest.approx(2)
    assert perplexity(losses, 3, 6) == pytest.approx(8)
    middles, values = buckets(losses, 3)
    assert middles == [1, 4, 6]
    assert values == pytest.approx([2, 8, 4])
    assert buckets(losses, 4)[0] == [2, 5]
    assert buckets(losses[:5], 4)[0] == [2]


def test_a_file_s_name_is_no_text(llm: Any, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("The sea was calm. Nobody spoke. " * 100)
    name = str(file)
    makers: list[Callable[[str], object]] = [
        lambda text: evals.perplexity(llm, text),
        lambda text: evals.needle(llm, [512], [0.5], prose=text),
        lambda text: essay(text, name="book"),
    ]
    for made in makers:
        with pytest.raises(Refused, match="a file's name where its text is wanted") as caught:
            made(name)
        assert f"{len(name)} characters" in caught.value.why
        assert "3200 bytes" in caught.value.why
        assert caught.value.fix == f"pathlib.Path({name!r}).read_text()"
        made(file.read_text())
        made(f"{name}\n" + file.read_text())
    missing = evals.perplexity(llm, name + "?")
    assert len(missing.losses) == len(llm.tokenize((name + "?").encode())) - 1
    file.write_text(name)
    assert len(evals.perplexity(llm, file).losses) == len(missing.losses) - 1


def test_needles_lie_where_they_are_said_to(llm: Any) -> None:
    hay = haystack(llm, 6000)
    assert len(hay.values) == 10
    assert len(hay.tokens) <= 6000
    for key, at in hay.positions.items():
        text = llm.detokenize(list(hay.tokens[at : at + 200])).decode()
        assert text.lstrip().startswith(NEEDLE.format(key=key, value=hay.values[key]))
    gaps = np.diff(list(hay.positions.values()))
    assert gaps.max() < 1.5 * gaps.min()
    assert haystack(llm, 6000) == hay
    with pytest.raises(ValueError, match="10 needles need more than 100 tokens"):
        haystack(llm, 100)


def test_answers_do_not_depend_on_the_ones_before(llm: Any) -> None:
    """Each question starts from the haystack alone: asked by itself, a key gets the same answer."""
    hay = haystack(llm, 3000, ("amber", "basil", "cobalt"))
    answers = ask(llm, hay)
    assert [a.key for a in answers] == ["amber", "basil", "cobalt"]
    last = ask(llm, type(hay)(hay.tokens, {"cobalt": hay.values["cobalt"]}, hay.positions))[0]
    assert last.said == answers[-1].said
    assert last.loss == pytest.approx(answers[-1].loss, abs=1e-3)
    assert ROOM == 64


def test_every_key_is_hidden_however_short_the_text(llm: Any) -> None:
    """The last part of a short text may be longer than what should stand behind the last needle."""
    least = next(n for n in range(100, 4000) if _fits(llm, n))
    for n in range(least, least + 200, 7):
        assert len(haystack(llm, n).positions) == 10


def _fits(llm: Any, n: int) -> bool:
    try:
        haystack(llm, n)
    except ValueError:
        return False
    return True
