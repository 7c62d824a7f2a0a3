"""Elastic context in llama-server: what a slot sees of it, alone and beside others, and what survives the process."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.extend import extend
from tests.elastic_chat import SCALE, TURNS, WINDOW, elastic_pair, stage_scale
from tests.server import ask, serving

pytestmark = [
    pytest.mark.engine,
    pytest.mark.real,
    pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama-server: `make test-full`"),
]

SHORT, LONG = TURNS[0], " ".join(TURNS)  # 55 and 315 tokens
MIDDLE = " ".join(TURNS[:3])  # past the window, and not yet at the last stage
FLAGS = ("-c", str(SCALE * WINDOW), "-t", "1", "--cache-ram", "0", "--no-warmup")  # one thread: always the same sums

# keys rounded otherwise move the log-probabilities of this 4-bit model by 0.15, -fa off by 0.2, the static table by 1
NOISE = 0.3


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a window of WINDOW tokens, and its extended file."""
    return elastic_pair(smollm2, tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def plain(files: tuple[Path, Path]) -> Path:
    return files[0]


@pytest.fixture(scope="module")
def elastic(files: tuple[Path, Path]) -> Path:
    return files[1]


@pytest.fixture(scope="module")
def shared(programs: Path, elastic: Path) -> Iterator[str]:
    """A server with one slot, for tests that leave nothing behind but a cache."""
    with serving(programs, "-m", elastic, *FLAGS, *slot_files(elastic.parent)) as address:
        yield address


@pytest.fixture
def server(shared: str) -> str:
    """The same with an empty cache, in memory too: no test gets what another one left."""
    erase(shared)
    return shared


@dataclass
class Answer:
    """Greedy tokens, the log-probability of each, and how much of the prompt was cached."""

    tokens: list[int]
    logprobs: list[float]
    n_cached: int
    truncated: bool


def request(address: str, prompt: str, n: int, **options: Any) -> Any:
    body = {"temperature": 0, "n_predict": n, "n_probs": 1, "ignore_eos": True, "return_tokens": True, **options}
    return ask(address, "/completion", prompt=prompt, **body)


def complete(address: str, prompt: str, n: int = 8, **options: Any) -> Answer:
    found = request(address, prompt, n, **options)
    logprobs = [token["logprob"] for token in found["completion_probabilities"]]
    return Answer(found["tokens"], logprobs, found["timings"]["cache_n"], found["truncated"])


def slot_files(folder: Path) -> tuple[str, str]:
    """The flag that lets slots be saved, restored and erased."""
    return "--slot-save-path", f"{folder}/"


def erase(address: str, slot: int = 0) -> None:
    ask(address, f"/slots/{slot}?action=erase", nothing=0)


def scales(address: str) -> list[float]:
    return [slot["rope_scale"] for slot in ask(address, "/slots")]


def n_tokens(address: str, text: str) -> int:
    return len(ask(address, "/tokenize", content=text)["tokens"])


def test_props_and_slots(server: str) -> None:
    assert ask(server, "/props")["rope"] == {"method": "mrrope-pro", "scale": SCALE, "elastic": True}
    seen = []
    for prompt in (SHORT, MIDDLE, LONG, SHORT):
        found = complete(server, prompt, 9)
        assert len(found.tokens) == 9
        (scale,) = scales(server)
        # the last token is said and not decoded
        assert scale == pytest.approx(stage_scale(n_tokens(server, prompt) + 8), rel=1e-6)
        seen.append(scale)
    assert seen[0] == 1.0 < seen[1] < seen[2]
    assert seen[3] == 1.0


def test_inside_the_window_it_is_the_original(programs: Path, plain: Path, elastic: Path) -> None:
    found = []
    for path in (plain, elastic):
        with serving(programs, "-m", path, *FLAGS, "-np", "2") as address:
            found.append([complete(address, text, 32) for text in (SHORT, TURNS[3])])
    assert found[0] == found[1]


def test_off_is_the_static_table(programs: Path, plain: Path, elastic: Path, server: str) -> None:
    static = extend(plain, elastic.with_name("static.gguf"), scale=SCALE, elastic=False).path
    found = []
    for arguments in (("-m", elastic, "--rope-elastic", "off"), ("-m", static)):
        with serving(programs, *arguments, *FLAGS) as address:
            assert ask(address, "/props")["rope"] == {"method": "mrrope-pro", "scale": SCALE, "elastic": False}
            assert scales(address) == [SCALE]
            found.append([complete(address, text) for text in (SHORT, LONG)])
    assert found[0] == found[1]
    assert found[0][0].logprobs != complete(server, SHORT).logprobs


def test_on_for_a_file_that_was_not_extended(programs: Path, plain: Path, server: str) -> None:
    flags = ("--rope-scaling", "mrrope-pro", "--rope-scale", str(SCALE))
    with serving(programs, "-m", plain, *flags, "--rope-elastic", "on", *FLAGS, *slot_files(plain.parent)) as address:
        assert ask(address, "/props")["rope"] == {"method": "mrrope-pro", "scale": SCALE, "elastic": True}
        assert complete(address, SHORT) == complete(server, SHORT)
        erase(server)
        erase(address)
        assert complete(address, MIDDLE) == complete(server, MIDDLE)
        assert scales(address) == scales(server) != [1.0]


def test_a_file_without_a_table_cannot_grow(programs: Path, plain: Path) -> None:
    command = [programs / "llama-server", "-m", plain, "--rope-elastic", "on", "--port", "0", *FLAGS]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if "rope-elastic" in line]
    assert ended.returncode > 0
    assert len(said) == 1
    assert "there is no table to grow to, extend the model or use --rope-scaling mrrope-pro" in said[0]


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
def test_a_short_chat_beside_a_long_one(programs: Path, plain: Path, elastic: Path, unified: bool) -> None:
    flags = ("-np", "3", "-kvu" if unified else "-no-kvu", "-c", str(3 * SCALE * WINDOW), "--cache-ram", "100")
    with serving(programs, "-m", plain, *FLAGS, *flags) as address:
        original = complete(address, SHORT, id_slot=1)
    with serving(programs, "-m", elastic, *FLAGS, *flags, *slot_files(elastic.parent)) as address:
        assert complete(address, SHORT, id_slot=1) == original
        long, short = at_once(address, original)
        assert (len(long.tokens), len(short.tokens)) == (100, 8)
        # cells of a long chat stay until another task needs them: S is that of the longest
        assert scales(address) == [SCALE] * 3
        assert short.tokens != original.tokens or short.logprobs != original.logprobs
        alone = complete(address, SHORT, id_slot=1, cache_prompt=False)
        if unified:  # idle slots make room when a task comes
            assert scales(address) == [1.0] * 3
        else:
            assert scales(address) == [SCALE] * 3
            assert alone.logprobs != original.logprobs
            erase(address, 0)
            alone = complete(address, SHORT, id_slot=1, cache_prompt=False)
            assert scales(address) == [1.0] * 3
        assert alone.tokens == original.tokens
        assert alone.logprobs == pytest.approx(original.logprobs, abs=NOISE)


def at_once(address: str, wanted: Answer) -> tuple[Answer, Answer]:
    """A long answer to a long prompt in slot 0, and a short one that begins while it is being made."""
    long: list[Answer] = []
    thread = threading.Thread(target=lambda: long.append(complete(address, LONG, 100, id_slot=0)))
    thread.start()
    while not (busy := ask(address, "/slots")[0])["is_processing"] or not busy["next_token"][0]["n_decoded"]:
        assert thread.is_alive(), "the long answer was over before it was seen"
    short = complete(address, SHORT, len(wanted.tokens), id_slot=1, cache_prompt=False)
    thread.join()
    return long[0], short


def test_an_earlier_turn_again(server: str) -> None:
    """Prompt caching, in place: what follows the common prefix is removed, and the table goes back."""
    first, later = complete(server, SHORT), complete(server, LONG)
    assert later.n_cached > 40
    again = complete(server, SHORT)
    assert scales(server) == [1.0]
    assert again.n_cached > 40
    assert again.tokens == first.tokens
    assert again.logprobs == pytest.approx(first.logprobs, abs=NOISE)
    onward = complete(server, LONG)
    assert onward.tokens == later.tokens
    assert scales(server) == [pytest.approx(stage_scale(n_tokens(server, LONG) + 7))]


def test_prompts_that_are_put_away(programs: Path, elastic: Path) -> None:
    """--cache-ram: the only slot changes from one conversation to another and back, and each brings its table along."""
    with serving(programs, "-m", elastic, *FLAGS, "--cache-ram", "100") as address:
        kept = {}
        for prompt in (LONG, TURNS[3]):
            complete(address, prompt)
            kept[prompt] = complete(address, prompt), scales(address)
        assert kept[TURNS[3]][1] == [1.0] != kept[LONG][1]
        for prompt in (LONG, TURNS[3], LONG):
            found = complete(address, prompt)
            assert found.n_cached == n_tokens(address, prompt) - 1
            assert (found, scales(address)) == kept[prompt]


@pytest.mark.parametrize("prompt", [MIDDLE, LONG], ids=["growing", "full"])
def test_a_saved_slot_in_another_process(programs: Path, elastic: Path, tmp_path: Path, prompt: str) -> None:
    flags = ("-m", elastic, *FLAGS, *slot_files(tmp_path))
    onward = prompt + " " + TURNS[3]
    with serving(programs, *flags) as address:
        complete(address, prompt, 1)
        saved, scale = ask(address, "/slots/0?action=save", filename="slot.bin"), scales(address)
        wanted = complete(address, onward, 16)
        grown = scales(address)
    with serving(programs, *flags) as address:
        restored = ask(address, "/slots/0?action=restore", filename="slot.bin")
        assert restored["n_restored"] == saved["n_saved"]
        assert scales(address) == scale != [1.0]
        found = complete(address, onward, 16)
        assert scales(address) == grown
    assert found == wanted
    assert found.n_cached > 100


def test_a_long_slot_restored_beside_a_short_chat(programs: Path, elastic: Path, tmp_path: Path) -> None:
    flags = ("-m", elastic, *FLAGS, "-np", "2", "-no-kvu", "-c", str(2 * SCALE * WINDOW))
    with serving(programs, *flags, *slot_files(tmp_path)) as address:
        complete(address, LONG, 1, id_slot=1)
        ask(address, "/slots/1?action=save", filename="long.bin")
        wanted = complete(address, LONG + " My", id_slot=1)
        erase(address, 1)
        complete(address, SHORT, id_slot=0)
        assert scales(address) == [1.0, 1.0]
        ask(address, "/slots/1?action=restore", filename="long.bin")
        found = complete(address, LONG + " My", id_slot=1)
        assert scales(address) == [pytest.approx(stage_scale(n_tokens(address, LONG + " My") + 7))] * 2
    assert found.n_cached == wanted.n_cached > 300
    assert found.tokens == wanted.tokens
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=NOISE)


def test_context_shift(programs: Path, elastic: Path) -> None:
    with serving(programs, "-m", elastic, *FLAGS, "--context-shift") as address:
        held = n_tokens(address, LONG)
        found = complete(address, LONG, SCALE * WINDOW - held + 40)
        assert found.truncated
        assert len(found.tokens) == SCALE * WINDOW - held + 40
        (scale,) = scales(address)
        # half of the context was let go once, and the rest moved to the front
        assert 1.0 < scale < SCALE
        assert complete(address, SHORT).tokens
        assert scales(address) == [1.0]


def test_drafts_are_taken_back_across_a_bound(programs: Path, elastic: Path) -> None:
    """Speculation: a rejected draft may have moved the table, and then it moves back."""
    text = "one two three four five six seven eight nine ten " * 12
    found = []
    for flags in ((), ("--spec-type", "ngram-simple", "--spec-draft-n-max", "8")):
        with serving(programs, "-m", elastic, *FLAGS, *flags) as address:
            found.append(request(address, text, 60))
            assert scales(address) == [pytest.approx(stage_scale(n_tokens(address, text) + 59))]
    timings = found[1]["timings"]
    assert 0 < timings["draft_n_accepted"] < timings["draft_n"]
    assert found[1]["tokens"] == found[0]["tokens"]


def test_several_answers_to_one_prompt(programs: Path, elastic: Path) -> None:
    with serving(programs, "-m", elastic, *FLAGS, "-np", "3", "-kvu") as address:
        options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        choices = ask(address, "/v1/completions", prompt=MIDDLE, n=3, **options)["choices"]
        (one,) = ask(address, "/v1/completions", prompt=MIDDLE, **options)["choices"]
        assert [choice["text"] for choice in choices] == [one["text"]] * 3


def test_chunks_that_are_reused_elsewhere(programs: Path, elastic: Path) -> None:
    """--cache-reuse: a turn is cut out of the middle, the keys after it move forward and turn to a smaller S."""
    cut = " ".join((TURNS[0], *TURNS[2:]))
    with serving(programs, "-m", elastic, *FLAGS, "--cache-reuse", "16", *slot_files(elastic.parent)) as address:
        complete(address, LONG)
        reused = complete(address, cut)
        assert reused.n_cached > 0.9 * n_tokens(address, cut)
        after = scales(address)
        erase(address)
        fresh = complete(address, cut)
        assert after == scales(address)
        assert reused.tokens == fresh.tokens


@pytest.mark.parametrize("cache", ["-kvu", "-no-kvu"])
def test_many_conversations_at_once(programs: Path, elastic: Path, cache: str) -> None:
    """More of them than slots, of every length, to the end of the context: each is answered, and nothing stays."""
    flags = ("-np", "4", cache, "-c", str(4 * SCALE * WINDOW), "--cache-ram", "50", "--context-shift")

    def converse(seed: int) -> bool:
        rng = random.Random(seed)
        n = rng.randint(1, 60)
        prompt = " ".join(rng.choices(TURNS, k=rng.randint(1, 6)))
        return len(complete(address, prompt, n, cache_prompt=rng.random() < 0.7).tokens) == n

    with serving(programs, "-m", elastic, *FLAGS, *flags, *slot_files(elastic.parent)) as address:
        original = complete(address, SHORT)
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(converse, range(20)))
        for slot in range(4):
            erase(address, slot)
        again = complete(address, SHORT, cache_prompt=False)
        assert scales(address) == [1.0] * 4
        assert again.tokens == original.tokens
        assert again.logprobs == pytest.approx(original.logprobs, abs=NOISE)


class Client:
    """The OpenAI API of a server, through OpenAI's own client."""

    def __init__(self, address: str) -> None:
        openai: Any = pytest.importorskip("openai")
        self.api = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

    def answer(self, messages: list[dict[str, str]]) -> list[str]:
        """The tokens of the streamed answer, which is added to the messages."""
        stream = self.api.chat.completions.create(
            model="any", messages=messages, temperature=0, max_tokens=16, stream=True, logprobs=True, top_logprobs=1
        )
        choices = [chunk.choices[0] for chunk in stream if chunk.choices]
        tokens = [one.token for choice in choices if choice.logprobs for one in choice.logprobs.content or ()]
        text = "".join(choice.delta.content or "" for choice in choices)
        assert text
        assert choices[-1].finish_reason in ("length", "stop")
        messages.append({"role": "assistant", "content": text})
        return tokens


def test_a_conversation_through_the_openai_api(programs: Path, plain: Path, elastic: Path, tmp_path: Path) -> None:
    flags = ("-m", elastic, *FLAGS, *slot_files(tmp_path))
    messages: list[dict[str, str]] = []
    with serving(programs, *flags) as address:
        told, seen = talk(address, messages, TURNS[:3])
        assert seen[0] == [1.0]
        assert 1.0 < seen[1][0] < seen[2][0] < SCALE  # two stages at least
        ask(address, "/slots/0?action=save", filename="chat.bin")
        half_way = list(messages)
        rest = talk(address, messages, TURNS[3:])
    with serving(programs, *flags) as address:
        ask(address, "/slots/0?action=restore", filename="chat.bin")
        assert scales(address) == seen[2]
        assert talk(address, half_way, TURNS[3:]) == rest
    assert half_way == messages
    assert rest[1][-1] == [SCALE]
    with serving(programs, "-m", plain, *FLAGS) as address:
        assert talk(address, [], TURNS[:1])[0] == told[:1]


def talk(address: str, messages: list[dict[str, str]], turns: tuple[str, ...]) -> tuple[list[list[str]], list[Any]]:
    """Say the turns one after the other; the tokens of every answer and S after it."""
    client, told, seen = Client(address), [], []
    for said in turns:
        messages.append({"role": "user", "content": said})
        told.append(client.answer(messages))
        seen.append(scales(address))
    return told, seen
