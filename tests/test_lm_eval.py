"""The model class for lm-evaluation-harness: likelihoods, windows, texts and templates, each computed again."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import EngineTrouble, Refused
from mrrope_gguf.evals.lm_eval import MrropeLM
from mrrope_gguf.evals.losses import token_nll
from mrrope_gguf.extend import extend
from mrrope_gguf.model import load
from tests import tiny
from tests.engine_worker import Worker
from tests.forward import forward

pytestmark = pytest.mark.engine

N_CTX = 256
PLAIN: dict[str, Any] = {"flash_attn": False, "n_threads": 1, "n_threads_batch": 1, "type_k": "f32", "type_v": "f32"}
TEXT = "the other inn on the hill is a river of tin and the heron in it "
Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("lm_eval") / "m.gguf", n_ctx=N_CTX)


@pytest.fixture(scope="module")
def lm(path: Path) -> Iterator[MrropeLM]:
    with MrropeLM(path, **PLAIN) as model:
        yield model


def asked(*args: Any) -> SimpleNamespace:
    """A request as the harness passes it: what a model reads of it is `args`."""
    return SimpleNamespace(args=args)


def scored(lm: MrropeLM, pairs: Pairs) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)


def greedy(path: Path, tokens: Sequence[int], n: int) -> list[int]:
    """What greedy decoding says, by the numpy forward pass."""
    said: list[int] = []
    for _ in range(n):
        said.append(int(forward(path, [*tokens, *said])[-1].argmax()))
    return said


@pytest.fixture(scope="module")
def pairs(path: Path) -> Pairs:
    """Few-shot questions with choices: a trunk that all share, stems, choices of one to four tokens.

    One choice is what greedy decoding says, another that but for its last token.
    """
    trunk, pairs = tiny.tokens(120), []
    for i in range(4):
        stem = [*trunk[: 120 - 15 * (i % 3)], *tiny.tokens(10 + i, i + 1)]
        choices = [tiny.tokens(1 + k, 50 + 7 * i + k) for k in range(4)]
        said = greedy(path, stem, 3)
        pairs += [(stem, choice) for choice in [*choices, said, [*said[:2], said[2] % 299 + 1]]]
    random.Random(1).shuffle(pairs)
    return pairs


# --- loglikelihood -----------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_a_forward_pass(path: Path, lm: MrropeLM, pairs: Pairs) -> None:
    found = scored(lm, pairs)
    for (context, continuation), (likelihood, is_greedy) in zip(pairs, found, strict=True):
        logits = forward(path, [*context, *continuation][:-1])[-len(continuation) :].astype(np.float64)
        rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        wanted = rows[np.arange(len(continuation)), continuation].sum()
        assert likelihood == pytest.approx(wanted, abs=1e-3 * len(continuation))
        assert is_greedy == (rows.argmax(1).tolist() == continuation)
    assert sum(is_greedy for _, is_greedy in found) >= 4


def test_sharing_changes_no_bit_and_decodes_less(path: Path, lm: MrropeLM, pairs: Pairs) -> None:
    before = lm.decoded
    found = scored(lm, pairs)
    shared = lm.decoded - before
    with MrropeLM(path, share=False, **PLAIN) as alone:
        assert scored(alone, pairs) == found
        assert alone.decoded == sum(len(a) + len(b) - 1 for a, b in pairs)
        assert shared < alone.decoded / 4


def test_answers_come_in_the_order_asked(lm: MrropeLM, pairs: Pairs) -> None:
    found = scored(lm, pairs)
    assert scored(lm, pairs[::-1]) == found[::-1]
    assert [scored(lm, [pair])[0] for pair in pairs[:4]] == found[:4]
    assert len(set(found)) > len(found) // 2


def test_a_long_request_loses_its_beginning(lm: MrropeLM, caplog: pytest.LogCaptureFixture) -> None:
    context, continuation = tiny.tokens(400), tiny.tokens(7, 3)
    kept = context[-(N_CTX + 1 - 7) :]
    with caplog.at_level(logging.WARNING):
        long, short = scored(lm, [(context, continuation), (kept, continuation)])
    assert long == short
    assert "1 requests lost tokens on the left: the context is 256" in caplog.text
    assert long != scored(lm, [(kept[1:], continuation)])[0]
    loss = token_nll(lm.llm, [*kept, *continuation])[-7:].sum()
    assert long[0] == pytest.approx(-loss, abs=1e-3)


def test_continuations_that_cannot_be_scored(lm: MrropeLM) -> None:
    assert len(scored(lm, [([5], tiny.tokens(N_CTX))])) == 1
    before = lm.decoded
    with pytest.raises(Refused, match="it has 257 tokens; one or more are needed, and 256 at most"):
        scored(lm, [([5], [6]), ([5], tiny.tokens(N_CTX + 1))])
    with pytest.raises(Refused, match="it has 0 tokens"):
        scored(lm, [([5], [])])
    assert lm.decoded == before


def test_without_context_bos_stands_before(path: Path, lm: MrropeLM) -> None:
    tokens = lm.tok_encode("the hill", add_special_tokens=False)
    assert lm.prefix_token_id == 1
    ((likelihood, _),) = lm.loglikelihood([asked("", "the hill")], disable_tqdm=True)
    assert likelihood == pytest.approx(-token_nll(lm.llm, [1, *tokens]).sum(), abs=1e-3)


def test_without_bos_eos_stands_before(lm: MrropeLM) -> None:
    with MrropeLM(lm.llm) as none:
        none.vocabulary.bos = -1  # as llama.cpp says it of a vocabulary that has none
        assert none.prefix_token_id == none.eot_token_id == 2
        tokens = none.tok_encode("the")
        assert tokens == lm.tok_encode("the", add_special_tokens=False)
        ((likelihood, _),) = none.loglikelihood([asked("", "the")], disable_tqdm=True)
        assert likelihood == pytest.approx(-token_nll(lm.llm, [2, *tokens]).sum(), abs=1e-3)
        none.vocabulary.eos = -1
        with pytest.raises(Refused, match="neither BOS nor EOS"):
            none.loglikelihood([asked("", "the")], disable_tqdm=True)


# --- rolling -----------------------------------------------------------------------------------------------------


def test_rolling_is_our_own_perplexity(lm: MrropeLM) -> None:
    texts = [TEXT * 3, "a", TEXT]
    found = lm.loglikelihood_rolling([asked(text) for text in texts], disable_tqdm=True)
    for text, likelihood in zip(texts, found, strict=True):
        tokens = lm.llm.tokenize(text.encode(), add_bos=True, special=False)
        assert tokens[0] == 1
        assert 2 <= len(tokens) <= N_CTX + 1
        losses = token_nll(lm.llm, tokens)
        assert likelihood == -math.fsum(losses.tolist())
    assert lm.loglikelihood_rolling([asked("")], disable_tqdm=True) == [0.0]


@pytest.mark.parametrize("n_ctx", [16, 40])
def test_windows_predict_every_token_once(path: Path, n_ctx: int) -> None:
    """The harness's rule, stated again: full windows, and a last one with all the context there is room for."""
    with MrropeLM(path, n_ctx, **PLAIN) as lm:
        tokens = [1, *lm.tok_encode(TEXT * 3, add_special_tokens=False)]
        assert lm.max_length == n_ctx
        assert len(tokens) > 2 * n_ctx
        ends = [*range(n_ctx, len(tokens) - 1, n_ctx), len(tokens) - 1]
        wanted = 0.0
        for start, end in pairwise([0, *ends]):
            first = max(end - n_ctx, 0)
            wanted += float(token_nll(lm.llm, tokens[first : end + 1])[start - first :].sum(dtype="float64"))
        (found,) = lm.loglikelihood_rolling([asked(TEXT * 3)], disable_tqdm=True)
        assert found == pytest.approx(-wanted, rel=1e-9)


# --- generate_until ----------------------------------------------------------------------------------------------


def test_texts_are_greedy(path: Path, lm: MrropeLM) -> None:
    contexts = [TEXT + end for end in ("the", "an", "on", "")] + [""]
    found = lm.generate_until([asked(c, {"max_gen_toks": 9}) for c in contexts], disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        said = greedy(path, lm.tok_encode(context) or [1], 9)
        assert text == lm.tok_decode(said[: said.index(2)] if 2 in said else said)
    assert len(set(found)) >= 3
    with MrropeLM(lm.llm, max_gen_toks=9) as by_default:
        assert by_default.generate_until([asked(contexts[0], {})], disable_tqdm=True) == found[:1]


def test_texts_end_at_a_stop_string(lm: MrropeLM) -> None:
    request: dict[str, Any] = {"max_gen_toks": 40}
    (whole,) = lm.generate_until([asked(TEXT, request)], disable_tqdm=True)
    stops = re.findall("[ -~]{2,}", whole)  # tokens are bytes here: these lie across several
    assert len(stops) >= 3
    for stop in [*stops[:3], stops[0][0]]:
        before = lm.decoded
        (found,) = lm.generate_until([asked(TEXT, {**request, "until": [stop, "", "zzz"]})], disable_tqdm=True)
        assert found == whole[: whole.index(stop)]
        assert lm.decoded - before < len(lm.tok_encode(TEXT)) + 39
        assert lm.generate_until([asked(TEXT, {**request, "until": stop})], disable_tqdm=True) == [found]


def test_a_context_is_cut_to_leave_room(lm: MrropeLM, caplog: pytest.LogCaptureFixture) -> None:
    long, n = TEXT * 20, 16
    kept = lm.tok_encode(long, left_truncate_len=N_CTX - n)
    with caplog.at_level(logging.WARNING):
        (found,) = lm.generate_until([asked(long, {"max_gen_toks": n})], disable_tqdm=True)
    assert "1 requests lost tokens on the left" in caplog.text
    said = [int(token) for token, _ in zip(lm.llm.generate(kept, temp=0.0), range(n), strict=False)]
    assert found == lm.tok_decode(said[: said.index(2)] if 2 in said else said)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"do_sample": True, "temperature": 0.8}, "do_sample=True, temperature=0.8"),
        ({"temperature": 0.5}, "asks for sampling"),
        ({"max_gen_toks": N_CTX}, "256 tokens cannot be generated"),
        ({"max_gen_toks": 0}, "0 tokens cannot be generated"),
    ],
)
def test_texts_that_cannot_be_had(lm: MrropeLM, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        lm.generate_until([asked("the", wanted)], disable_tqdm=True)


def test_what_has_no_effect_is_said(lm: MrropeLM, caplog: pytest.LogCaptureFixture) -> None:
    wanted = {"max_gen_toks": 2, "top_p": 0.9, "repetition_penalty": 1.1, "temperature": 0.0}
    lm.generate_until([asked("the", wanted)], disable_tqdm=True)
    assert "have no effect here: repetition_penalty" in caplog.text


# --- models and ways ---------------------------------------------------------------------------------------------


def test_a_model_that_is_loaded(path: Path) -> None:
    llm = load(path, **PLAIN)
    lm = MrropeLM(llm)
    assert lm.llm is llm
    assert lm.max_length == N_CTX
    found = scored(lm, [([1, 5], [6])])
    lm.close()
    assert llm.n_ctx() == N_CTX  # it stays its owner's
    with pytest.raises(Refused, match="method, n_threads: not for a model that is loaded"):
        MrropeLM(llm, method="yarn", n_threads=2)
    llm.close()
    with MrropeLM(path, **PLAIN) as own:
        assert scored(own, [([1, 5], [6])]) == found
        info = own.get_model_info()
    assert info["model_file"]["sha256"]  # type: ignore[index]
    assert info["max_length"] == N_CTX


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"scale": 4.0}, "scale=4 without a method"),
        ({"method": "yarn@B"}, "yarn@B: not for lm-evaluation-harness"),
        ({"method": "yran", "scale": 4.0}, "unknown method 'yran'"),
        ({"method": "yarn"}, "how far should the context be stretched"),
        ({"method": "yarn", "scale": 4.0, "elastic": True}, "a method says itself"),
        ({"n_ctx": 1024}, "1024 tokens of context, and the file has 256"),
    ],
)
def test_refused(path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        MrropeLM(path, **how)


def test_truncate_is_the_model_in_its_window(path: Path, lm: MrropeLM) -> None:
    pair = (tiny.tokens(300), tiny.tokens(3, 1))
    with MrropeLM(path, 512, method="truncate", **PLAIN) as cut, MrropeLM(path, 512, method="none", **PLAIN) as none:
        assert (cut.max_length, none.max_length) == (N_CTX, 512)
        assert scored(cut, [pair]) == scored(lm, [pair])
        assert scored(none, [pair]) != scored(lm, [pair])


def test_a_method_is_its_extended_file(path: Path, tmp_path: Path) -> None:
    """On stock, where a method becomes a file, and its context S times as long."""
    pairs = [(tiny.tokens(600), tiny.tokens(4, 1)), (tiny.tokens(20), [7])]
    done = extend(path, tmp_path / "long.gguf", scale=4, method="mrrope-uni", rendering="portable", elastic=False)
    with MrropeLM(path, method="mrrope-uni", scale=4, **PLAIN) as way, MrropeLM(done.path, **PLAIN) as file:
        assert way.max_length == file.max_length == 4 * N_CTX
        assert scored(way, pairs) == scored(file, pairs)
        assert way.get_model_info() != file.get_model_info()
    with pytest.raises(EngineTrouble, match="elastic: needs the patched engine"):
        MrropeLM(path, method="elastic", scale=4)


def by_ways(path: Path, extended: Path, pairs: Pairs) -> dict[str, Any]:
    """On the patched engine: the scores of each way, and of the extended file as it is and held."""
    ways: dict[str, dict[str, Any]] = {
        "none": {"method": "none", "n_ctx": 4 * N_CTX},
        "mrrope-pro": {"method": "mrrope-pro", "scale": 4},
        "elastic": {"method": "elastic:mrrope-pro", "scale": 4},
    }
    found = {}
    for name, how in ways.items():
        with MrropeLM(path, **how, **PLAIN) as lm:
            found[name] = scored(lm, pairs)
    held: dict[str, dict[str, Any]] = {"as it is": {}, "alone": {"share": False}, "held": {"elastic": False}}
    for name, how in held.items():
        with MrropeLM(extended, **how, **PLAIN) as lm:
            found[name] = scored(lm, pairs)
            assert lm.max_length == 4 * N_CTX
    return found


def test_elastic(engine: Worker, path: Path, tmp_path: Path) -> None:
    """The model itself in its window, whatever longer request went before, and a table that grows past it."""
    trunk = tiny.tokens(900)
    pairs = [(trunk[:n] + tiny.tokens(3, n), tiny.tokens(2, n)) for n in (100, 150, 240, 500, 700, 890)]
    done = extend(path, tmp_path / "long.gguf", scale=4, method="mrrope-pro", rendering="engine")
    found = engine.call(by_ways, path, done.path, pairs)
    assert found["elastic"] == found["as it is"]
    assert found["held"] == found["mrrope-pro"]
    for i, (grown, alone) in enumerate(zip(found["elastic"], found["alone"], strict=True)):
        assert grown[0] == pytest.approx(alone[0], abs=0.02)
        if i < 3:
            assert alone == found["none"][i]
        else:
            assert abs(grown[0] - found["none"][i][0]) > 0.05


# --- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_model(smollm2: Path) -> None:
    shots = "".join(f"Question: what is {n} + {n}?\nAnswer: {2 * n}\n\n" for n in range(2, 6))
    capitals = {"France": "Paris", "Italy": "Rome"}
    requests = [
        asked(f"{shots}Question: what is the capital of {land}?\nAnswer:", f" {city}")
        for land in capitals for city in capitals.values()
    ]  # fmt: skip
    with MrropeLM(smollm2, 512, n_threads=1, n_threads_batch=1) as lm:
        found = lm.loglikelihood(requests, disable_tqdm=True)
        shared = lm.decoded
        assert found[0] > found[1]
        assert found[2] < found[3]
        assert found[0][1]
        text = "A river rises in the hills and runs past two towns before it comes to the sea."
        (rolling,) = lm.loglikelihood_rolling([asked(text)], disable_tqdm=True)
        tokens = [lm.prefix_token_id, *lm.llm.tokenize(text.encode(), add_bos=False)]
        assert rolling == pytest.approx(-token_nll(lm.llm, tokens).sum(dtype="float64"), rel=1e-9)
        (said,) = lm.generate_until([asked(requests[0].args[0], {"until": ["\n"]})], disable_tqdm=True)
        assert said.strip().startswith("Paris")
        talk = lm.apply_chat_template([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}])
        assert talk == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert lm.tok_encode(talk)[:1] == [1]
        alone = MrropeLM(lm.llm, share=False)
        assert alone.loglikelihood(requests, disable_tqdm=True) == found
        assert shared <= alone.decoded / 2
