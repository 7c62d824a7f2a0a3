"""Queries and keys of a running graph: what attention multiplies, caught; scores by distance, and how they fall."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mrrope_gguf import engine as mrrope_engine
from mrrope_gguf.cli import main
from mrrope_gguf.engine.nodes import catch_nodes
from mrrope_gguf.errors import EngineTrouble, MrropeError, Refused
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.figures.attention import Attention, Caught, attention
from mrrope_gguf.figures.scores import binned, mean_scores, pair_dims, trend
from mrrope_gguf.figures.words import Words
from mrrope_gguf.kernels import rope
from mrrope_gguf.model import load
from mrrope_gguf.tables import RopeTable, rope_table
from tests import tiny
from tests.engine_models import model
from tests.engine_worker import Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

TOKENS = tiny.tokens(150)
WORDS = Words("words", "The middle pairs carry the order of near and far words, and so on. " * 20)
SMALL: dict[str, Any] = {"length": 256, "queries": 32, "n_threads": 1}


def pro(n_rot: int = 16) -> RopeTable:
    return rope_table("mrrope-pro", n_rot=n_rot, freq_base=1e4, n_ctx_orig=64, scale=4)


def nodes(path: Path, table: RopeTable | None, type_k: str = "f32") -> dict[str, Floats]:
    """Layer 0's queries and keys before and after their rotation, and the scores its graph computes from them."""
    found: dict[str, Floats] = {}

    def take(name: str, value: Floats) -> None:
        found[name + "/rotated" * (name in found)] = value  # each name twice: as projected, as rotated

    def wanted(name: str, op: str) -> bool:
        return (name in ("Qcur-0", "Kcur-0") and op in ("RESHAPE", "ROPE")) or (name == "kq-0" and op == "MUL_MAT")

    llm = load(path, 256, past_window=True, flash_attn=False, n_threads=1, type_k=type_k)
    with catch_nodes(llm, wanted, take):
        if table is not None:
            mrrope_engine.set_table(llm, table)
        with Decoder(llm) as decoder:
            list(decoder.logits(TOKENS, every=False))
    return found


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llama", "qwen2", "stablelm"])
@pytest.mark.parametrize("extended", [False, True])
def test_caught_queries_and_keys_are_those_of_the_graph(
    engine: Worker, stock: Worker, tmp_path: Path, name: str, extended: bool
) -> None:
    """Rotated as the table says, and their products are the scores that attention computes."""
    path = model(tmp_path, name, n_ctx=64)
    n_rot = 8 if name == "stablelm" else 16
    table = pro(n_rot) if extended else rope_table("none", n_rot=n_rot, freq_base=1e4, n_ctx_orig=64, scale=1)
    found = (engine if extended else stock).call(nodes, path, table if extended else None)
    q, k = found["Qcur-0/rotated"], found["Kcur-0/rotated"]
    assert (q.shape, k.shape) == ((150, 4, 16), (150, 2, 16))
    for which, rotated in (("Q", q), ("K", k)):
        before = np.ascontiguousarray(found[f"{which}cur-0"])
        by_hand = rope(before, np.arange(150), table, "norm" if name == "llama" else "neox")
        np.testing.assert_allclose(rotated, by_hand, atol=2e-5 * float(np.abs(before).max()))
    scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1))
    seen = found["kq-0"][:, :150, :150]
    assert seen.shape == scores.shape
    np.testing.assert_allclose(np.tril(scores), np.tril(seen), atol=1e-4 * float(np.abs(scores).max()))


@pytest.mark.engine
def test_a_cache_of_half_precision_rounds_the_same_scores(stock: Worker, tmp_path: Path) -> None:
    found = stock.call(nodes, model(tmp_path, "llama"), None, "f16")
    q, k = found["Qcur-0/rotated"], found["Kcur-0/rotated"]
    scores = np.tril(np.einsum("qhd,khd->hqk", q, np.repeat(k, 2, axis=1)))
    off = np.abs(np.tril(found["kq-0"][:, :150, :150]) - scores).max() / np.abs(scores).max()
    assert 1e-6 < off < 2e-3


def failing(path: Path) -> None:
    def take(name: str, value: Floats) -> None:
        raise KeyError(name)

    llm = load(path, 256, past_window=True, flash_attn=False, n_threads=1)
    with catch_nodes(llm, lambda name, op: name == "Kcur-0" and op == "ROPE", take), Decoder(llm) as decoder:
        list(decoder.logits(TOKENS, every=False))


def unreadable(path: Path) -> None:
    llm = load(path, 256, past_window=True, flash_attn=False, n_threads=1)
    with catch_nodes(llm, lambda name, op: op == "PERMUTE", lambda name, value: None) as check:
        with Decoder(llm) as decoder:
            list(decoder.logits(TOKENS, every=False))
        check()
        raise AssertionError("it was read")


@pytest.mark.engine
def test_what_goes_wrong_inside_the_graph_comes_out(stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama")
    with pytest.raises(KeyError, match="Kcur-0"):
        stock.call(failing, path)
    with pytest.raises(EngineTrouble, match="not contiguous float32"):
        stock.call(unreadable, path)


def figure(path: Path, methods: str = "none,mrrope-uni,mrrope-pro", **options: Any) -> Attention:
    return attention(path, words=WORDS, methods=methods, **{**SMALL, **options})


@pytest.mark.engine
def test_tables_that_are_set_and_tables_in_files_score_alike(engine: Worker, stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=64, n_layer=2)
    ours, theirs = engine.call(figure, path), stock.call(figure, path)
    assert [(c.method, c.layer, c.head) for c in ours.curves] == [
        (m, il, h) for m in ("none", "mrrope-uni", "mrrope-pro") for il in (0, 1) for h in range(4)
    ]
    assert (ours.d_l, ours.d_h, ours.n_ctx) == (0, 3, 256)
    scores, same = (np.array([c.scores for c in each.curves]) for each in (ours, theirs))
    np.testing.assert_allclose(scores, same, atol=2e-3 * float(np.abs(scores).max()))
    plain, uni, pro = scores.reshape(3, 8, -1)
    assert not np.allclose(plain, uni, atol=1e-3)
    assert not np.allclose(uni, pro, atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["llama.gguf"]


@pytest.mark.engine
def test_the_scores_are_those_of_single_queries(stock: Worker, tmp_path: Path) -> None:
    """The figure's numbers, from q and k caught another way."""
    path = model(tmp_path, "llama", n_ctx=64)
    found = stock.call(figure, path, "none")
    q, k = stock.call(everything, path)
    dims = pair_dims(range(4), 16, "norm")
    by_distance = [np.mean([q[t, 1, dims] @ k[t - d, 0, dims] for t in range(224, 256)]) / 4.0 for d in range(1, 224)]
    bounds = [i * 223 // 40 for i in range(41)]
    assert list(found.distances) == [(a + b + 1) / 2 for a, b in pairwise(bounds)]
    means = [np.mean(by_distance[a:b]) for a, b in pairwise(bounds)]
    np.testing.assert_allclose(found.curves[1].scores, means, atol=1e-5)


def everything(path: Path) -> tuple[Floats, Floats]:
    """All of layer 0's rotated queries and keys of the figure's text."""
    kept: dict[str, list[Floats]] = {"Qcur-0": [], "Kcur-0": []}
    llm = load(path, 256, past_window=True, flash_attn=False, n_threads=1)
    tokens = WORDS.tokens(llm, 256)
    with (
        catch_nodes(llm, lambda name, op: name in kept and op == "ROPE", lambda name, v: kept[name].append(v)),
        Decoder(llm) as decoder,
    ):
        list(decoder.logits(tokens, every=False))
    return np.concatenate(kept["Qcur-0"]), np.concatenate(kept["Kcur-0"])


@pytest.mark.engine
def test_global_layers_alone_are_looked_at(stock: Worker, engine: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "gemma3", n_ctx=64)
    assert {c.layer for c in engine.call(figure, path, "mrrope-pro").curves} == {5}
    with pytest.raises(Refused, match="no global RoPE in layer 0, 7"):
        stock.call(figure, path, "none", layers=[0, 7])
    many = model(tmp_path, "llama", n_ctx=64, n_layer=9)
    assert list(dict.fromkeys(c.layer for c in stock.call(figure, many, "none").curves)) == [0, 3, 5, 8]
    assert {c.layer for c in stock.call(figure, many, "none", layers=[4]).curves} == {4}


@pytest.mark.engine
def test_what_is_refused(stock: Worker, tmp_path: Path) -> None:
    path = model(tmp_path, "llama", n_ctx=64)
    with pytest.raises(Refused, match="200 queries of 256 tokens"):
        stock.call(figure, path, queries=200)
    with pytest.raises(MrropeError, match="words: the text is too short"):
        stock.call(figure, path, "none", length=4096)
    with pytest.raises(Refused, match="no pairs lie in the middle"):
        stock.call(figure, model(tmp_path, "llama", n_ctx=1 << 20, freq_base=4.0), "none")
    with pytest.raises(Refused, match="normalises queries and keys after"):
        stock.call(figure, model(tmp_path, "maincoder", n_ctx=64), "none")


@pytest.mark.engine
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, text = model(tmp_path, "llama", n_ctx=64), tmp_path / "text.txt"
    text.write_text(WORDS.text)
    command = ["figure", "attention", str(path), "--text", str(text), "-c", "256", "--queries", "32", "-t", "1"]
    assert main([*command, "--methods", "none,yarn", "--out", str(tmp_path), "--data", str(tmp_path / "a.csv")]) == 0
    out, err = capsys.readouterr()
    assert "layer.head" in out
    assert "engine: stock llama.cpp" in err
    assert (tmp_path / "figure-attention.png").stat().st_size > 10_000
    assert "rho of each head" in (tmp_path / "figure-attention.svg").read_text()
    assert len(list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))) == 2 * 4 * 40
    assert main([*command, "--methods", "none", "--layers", "0", "--json"]) == 0
    curves = json.loads(capsys.readouterr().out)["curves"]
    assert [c["head"] for c in curves] == [0, 1, 2, 3]
    assert all(-1 <= c["rho"] <= 1 and 0 <= c["falling"] <= 1 and len(c["scores"]) == 40 for c in curves)
    assert main([*command[:-6], "--text", str(tmp_path / "none.txt")]) == 1
    assert "name a UTF-8 text file, or one of britannica" in capsys.readouterr().err


# --- the numbers alone -------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_kept() -> None:
    caught = Caught([1], n=100, queries=10)
    assert caught.wanted("Qcur-1", "ROPE")
    assert caught.wanted("Kcur-1", "ROPE")
    for name, op in (("Qcur-0", "ROPE"), ("Qcur-1", "RESHAPE"), ("Vcur-1", "ROPE"), ("Qcur-11", "ROPE"), ("", "ROPE")):
        assert not caught.wanted(name, op)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((100, heads, 8)).astype(np.float32) for heads in (4, 2))
    for start in range(0, 100, 32):
        for name, values in (("Qcur-1", q), ("Kcur-1", k)):
            caught.take(name, values[start : start + 32])
    queries, keys = caught.layer(1)
    assert np.array_equal(queries, q[90:])
    assert np.array_equal(keys, k)
    assert sum(part.nbytes for part in caught._parts["Q", 1]) == queries.nbytes


def test_a_layer_that_was_not_rotated() -> None:
    with pytest.raises(EngineTrouble, match="layer 0: the graph names no rotated queries"):
        Caught([0], n=100, queries=10).layer(0)


@pytest.mark.parametrize("kind", ["norm", "neox"])
def test_a_pair_that_turns_slowly_falls_steadily(kind: str) -> None:
    """Alike queries and keys, one pair of half a turn: the score is a cosine that falls all the way."""
    n, m = 200, 20
    table = rope_table("none", n_rot=8, freq_base=float(n) ** 2, n_ctx_orig=64, scale=1)  # pair 2 turns 1/n a token
    ones = np.zeros((n, 1, 8), dtype=np.float32)
    ones[:, :, pair_dims([2], 8, kind)[0]] = 1.0
    turned = rope(ones, np.arange(n), table, kind)
    scores = mean_scores(turned[-m:], turned, pair_dims([2], 8, kind))
    distances = np.arange(1, n - m)
    np.testing.assert_allclose(scores[0], np.cos(distances / n), atol=1e-5)
    assert trend(binned(scores, [1, 60, 120, 179])[0]) == (1.0, 1.0)
    assert trend(scores[0][::-1]) == (-1.0, 0.0)
    assert trend(mean_scores(turned[-m:], turned, pair_dims([0], 8, kind))[0])[1] == 0.0  # nothing in pair 0


def test_pairs_share_the_whole_score() -> None:
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((n, h, 16)).astype(np.float32) for n, h in ((5, 4), (50, 2)))
    whole = mean_scores(q, k, range(16))
    for kind in ("norm", "neox"):
        parts = [mean_scores(q, k, pair_dims([i], 16, kind)) for i in range(8)]
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, atol=1e-5)
    by_hand = np.mean([q[j, 3] @ k[45 + j - 7, 1] for j in range(5)])
    assert whole.shape == (4, 44)
    assert whole[3, 6] == pytest.approx(by_hand, abs=1e-5)


def test_trend() -> None:
    assert trend([3.0, 1.0, 2.0]) == (0.5, 0.5)
    assert trend([2.0, 2.0, 1.0]).rho == pytest.approx(0.75**0.5)  # ties share a rank
    assert np.isnan(trend([1.0, 1.0, 1.0]).rho)
