"""What a suite finds in texts is what the plain computations give: losses and divergences, of every way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.engine import set_table
from mrrope_gguf.errors import MrropeError, Refused
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.losses import token_nll
from mrrope_gguf.evals.passes import LossPass
from mrrope_gguf.evals.run_losses import divergence
from mrrope_gguf.evals.suite import NAME
from mrrope_gguf.evals.ways import DEFAULT
from mrrope_gguf.extend import extend
from mrrope_gguf.kernels import nll
from mrrope_gguf.model import load
from mrrope_gguf.tables import rope_table
from tests.engine_worker import Worker
from tests.eval_suite import CHUNKS, OPTIONS, ORIG, cells, lines, model, planned, prose, request, run

pytestmark = pytest.mark.engine

N = 1024
Means = list[float]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(tmp_path)
    prose(tmp_path / "t.txt")
    return tmp_path


def losses(folder: Path, method: str | None, scale: float, n: int = N, elastic: bool = False) -> Any:
    """Losses of the text in one pass, float32 (n,): by a table set by hand, or by a file that grows."""
    path = folder / "m.gguf"
    if elastic:
        path = extend(path, folder / "e.gguf", scale=scale, method=method or "", elastic=True, rendering="engine").path
    llm = load(path, n_ctx=N, past_window=True, n_threads_batch=1, **CHUNKS)
    if method and not elastic:
        set_table(llm, rope_table(method, n_rot=16, freq_base=1e4, n_ctx_orig=ORIG, scale=scale))
    found = token_nll(llm, tokens(llm, folder, n))
    llm.close()
    return found


def tokens(llm: Any, folder: Path, n: int = N) -> list[int]:
    return list(llm.tokenize((folder / "t.txt").read_bytes(), add_bos=True, special=False))[: n + 1]


def means(values: Any) -> Means:
    return [round(float(np.mean(values[at : at + 256], dtype="float64")), 6) for at in range(0, len(values), 256)]


def blocks(runs: dict[str, Any], way: str, kind: str = "ppl") -> Means:
    """A way's blocks in the order of the text."""
    mine = [cell for cell in cells(runs).values() if (cell["task"], cell["way"]) == (kind, way)]
    return [mean for cell in sorted(mine, key=lambda cell: cell["start"]) for mean in cell["blocks"]]


def asked(folder: Path, what: str, methods: str, lengths: tuple[int, ...] = (512, N), **others: Any) -> Any:
    return request(what, methods, lengths, texts=[str(folder / "t.txt")], **{"options": CHUNKS, **others})


# --- losses ------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_one_pass(engine: Worker, folder: Path) -> None:
    runs = engine.call(run, folder / "m.gguf", asked(folder, "ppl", "none,yarn,mrrope-uni,elastic"), folder / "out")
    assert blocks(runs, "none") == means(engine.call(losses, folder, None, 1.0))
    for method in ("yarn", "mrrope-uni"):
        assert blocks(runs, method) == means(engine.call(losses, folder, method, 4.0))
    assert blocks(runs, "elastic") == means(engine.call(losses, folder, DEFAULT, 4.0, elastic=True))
    assert blocks(runs, "elastic")[0] == blocks(runs, "none")[0] != blocks(runs, "yarn")[0]
    assert len({tuple(blocks(runs, way)) for way in ("none", "yarn", "mrrope-uni", "elastic")}) == 4


def test_mode_b_has_a_pass_and_a_table_for_each_length(engine: Worker, folder: Path) -> None:
    lengths = (256, 512, 1024)
    runs = engine.call(run, folder / "m.gguf", asked(folder, "ppl", "yarn@B", lengths), folder / "out")
    for n in lengths:
        by_hand = engine.call(losses, folder, "yarn" if n > ORIG else None, n / ORIG, n)
        assert runs[f"ppl/t/yarn@B/0-{n}"]["blocks"] == means(by_hand)


def truncated(folder: Path) -> Any:
    """Losses of N positions where the model is given the last window's tokens anew every half window."""
    llm = load(folder / "m.gguf", n_ctx=N, past_window=True, n_threads_batch=1, **CHUNKS)
    text = tokens(llm, folder)
    found = token_nll(llm, text[: ORIG + 1]).tolist()
    for end in range(ORIG + ORIG // 2, N + 1, ORIG // 2):
        shown = [text[0], *text[end - ORIG + 1 : end]]
        with Decoder(llm) as decoder:
            rows = np.concatenate([part.copy() for part in decoder.logits(shown)])[ORIG // 2 :]
        found += nll(rows, np.asarray(text[end - ORIG // 2 + 1 : end + 1])).tolist()
    llm.close()
    return found


def test_truncation_is_the_model_anew_on_its_last_tokens(stock: Worker, folder: Path) -> None:
    wanted = means(stock.call(truncated, folder))
    # rounding: the two read their batches at other places
    alone = stock.call(run, folder / "m.gguf", asked(folder, "ppl", "truncate"), folder / "alone")
    assert blocks(alone, "truncate") == pytest.approx(wanted, abs=1e-4)
    both = stock.call(run, folder / "m.gguf", asked(folder, "ppl", "truncate,none"), folder / "both")
    assert blocks(both, "truncate") == blocks(alone, "truncate")
    assert blocks(both, "none")[0] == blocks(both, "truncate")[0]
    names = list(cells(both))
    assert names.index("ppl/t/none/0-256") < names.index("ppl/t/truncate/256-512")  # whatever the order asked for
    assert names[-1] == "ppl/t/truncate/0-256"  # of none's, and not read again


def test_truncation_is_always_beside_perplexity(folder: Path) -> None:
    ways = {task.way for task in planned(folder / "m.gguf", asked(folder, "ppl", "yarn"))}
    assert ways == {"yarn", "truncate"}
    assert {task.way for task in planned(folder / "m.gguf", asked(folder, "kl", "none,yarn"))} == {"yarn"}


def test_cells_are_the_same_for_every_way(folder: Path) -> None:
    """Also where half a window is no whole number of blocks, and a last cell is short."""
    path = model(folder, n_ctx=1000)
    found = planned(path, asked(folder, "ppl", "none,truncate,yarn", (1500, 2600)))
    assert len({task.cells for task in found if isinstance(task, LossPass)}) == 1
    assert [cell for task in found[:1] if isinstance(task, LossPass) for cell in task.cells][-1][1] == 2600


# --- divergences -------------------------------------------------------------------------------------------------


def naive_kl(folder: Path, method: str) -> Means:
    """KL(original || method) in float64 from whole logits."""
    llm = load(folder / "m.gguf", n_ctx=N, past_window=True, n_threads_batch=1, **CHUNKS)
    text, rows = tokens(llm, folder)[:ORIG], []
    for table in (None, rope_table(method, n_rot=16, freq_base=1e4, n_ctx_orig=ORIG, scale=4)):
        llm.reset()
        with Decoder(llm) as decoder:
            decoder.clear()
            set_table(llm, table)
            x = np.concatenate([part.astype(np.float64) for part in decoder.logits(text)])
        rows.append(x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True))
    llm.close()
    p, q = rows
    return means((np.exp(p) * (p - q)).sum(1))


def test_divergence_from_the_original(engine: Worker, stock: Worker, folder: Path) -> None:
    found = engine.call(run, folder / "m.gguf", asked(folder, "kl", "yarn,elastic,elastic:linear"), folder / "out")
    assert list(cells(found)) == ["kl/t/yarn/0-256", "kl/t/elastic/0-256", "kl/t/elastic:linear/0-256"]
    wanted = engine.call(naive_kl, folder, "yarn")
    assert wanted[0] > 0.01
    assert blocks(found, "yarn", "kl") == pytest.approx(wanted, abs=2e-6)
    assert blocks(found, "elastic", "kl") == blocks(found, "elastic:linear", "kl") == [0.0]  # bit for bit the original
    files = stock.call(run, folder / "m.gguf", asked(folder, "kl", "yarn"), folder / "stock")
    assert blocks(files, "yarn", "kl") == pytest.approx(wanted, rel=1e-3)


def test_cells_that_are_missing_are_made_alone(engine: Worker, folder: Path) -> None:
    """A hole in the middle is filled with what stood there, for losses and for divergences."""
    path = model(folder, n_ctx=1536)
    for what, ways in (("kl", "yarn"), ("ppl", "none,truncate,yarn,elastic")):
        wanted, out = asked(folder, what, ways, (2816,), options=OPTIONS), folder / what
        whole = engine.call(run, path, wanted, out)
        lost = [key for key in cells(whole) if key.rsplit("/", 1)[1] in ("768-1536", "1536-2304")]
        assert len(lost) == (1 if what == "kl" else 8)
        log = out / NAME
        log.write_text("".join(f"{x}\n" for x in log.read_text().splitlines() if json.loads(x)["run"] not in lost))
        assert engine.call(run, path, wanted, out) == whole
        assert sorted(lines(out)[-len(lost) :]) == sorted(lost)


def test_divergence_by_hand() -> None:
    rng = np.random.default_rng(0)
    theirs, ours = rng.normal(0, 3, (2, 70, 50)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (theirs.astype(float), ours.astype(float)))
    np.testing.assert_allclose(divergence(theirs, ours), (p * np.log(p / q)).sum(1), rtol=1e-9)
    assert not divergence(theirs, theirs).any()
    assert divergence(theirs + 1000, theirs)[0] == pytest.approx(0, abs=1e-4)  # no overflow


# --- bad input ---------------------------------------------------------------------------------------------------


def test_texts_that_are_too_short(folder: Path) -> None:
    with pytest.raises(MrropeError, match="t: the text is shorter than the longest length") as caught:
        planned(folder / "m.gguf", asked(folder, "ppl", "none", (65536,)))
    assert "65536 positions need 65537" in caught.value.why
    prose(folder / "short.txt", 60)
    with pytest.raises(MrropeError, match="short: the text is shorter"):
        planned(folder / "m.gguf", request("ppl", "none", texts=[str(folder / "t.txt"), str(folder / "short.txt")]))
    planned(folder / "m.gguf", asked(folder, "kl", "yarn", (65536,)))  # which reads the window alone


def test_lengths_and_names_that_cannot_be(folder: Path) -> None:
    path = folder / "m.gguf"
    for methods, lengths, reason in (
        ("none", (100,), "a length of 100 tokens"),
        ("none,yearn", (512,), "unknown method 'yearn'"),
        ("yarn,yarn", (512,), "named twice"),
    ):
        with pytest.raises(Refused, match=reason):
            planned(path, asked(folder, "ppl", methods, lengths))
    with pytest.raises(MrropeError, match="nih: no such task of RULER"):
        planned(path, request("ruler", "none", tasks=["nih"]))
    with pytest.raises(MrropeError, match="vk: no such retrieval task"):
        planned(path, request("retrieval", "none", tasks=["vk"]))
    with pytest.raises(MrropeError, match="nothing to measure"):
        planned(path, asked(folder, "kl", "none,truncate"))
    with pytest.raises(MrropeError, match="no such text"):
        planned(path, request("ppl", "none", texts=[str(folder / "gone.txt")]))


def test_short_lengths_of_tasks() -> None:
    """Blocks of 256 are for losses: a task itself says what is too short for it."""
    path = Path(__file__).parent / "data" / "retriever-256.gguf"
    for what, tasks in ("needle", []), ("retrieval", ["passkey"]):
        assert planned(path, request(what, "none", (160,), tasks=tasks, samples=1))
        with pytest.raises(MrropeError, match="16 tokens"):
            planned(path, request(what, "none", (16,), tasks=tasks, samples=1))
