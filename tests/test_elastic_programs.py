"""Elastic context in llama.cpp's other programs: llama-completion, llama-cli, llama-perplexity."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from mrrope_gguf.extend import extend
from tests.elastic_chat import SCALE, TURNS, WINDOW, elastic_pair, stage_scale

pytestmark = [
    pytest.mark.engine,
    pytest.mark.real,
    pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama.cpp's programs: `make test-full`"),
]

SHORT, LONG = TURNS[0], " ".join(TURNS)
FLAGS = ("-c", str(SCALE * WINDOW), "-t", "1", "--no-warmup", "-lv", "4")


@pytest.fixture(scope="module")
def files(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a window of WINDOW tokens, and its extended file."""
    plain, elastic = elastic_pair(smollm2, tmp_path_factory.mktemp("elastic"))
    extend(plain, elastic.with_name("static.gguf"), scale=SCALE, elastic=False)
    return plain, elastic


def ran(program: Path, *arguments: str | Path) -> tuple[str, str]:
    """What a program writes to stdout and to stderr."""
    if not program.exists():
        pytest.skip(f"{program.name} is not among the programs of this build")
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def scales(log: str) -> list[float]:
    """The scales that a context went through, by its log."""
    moves = re.findall(r"positions, scale ([\d.]+) -> ([\d.]+)", log)
    assert all(one[1] == following[0] for one, following in pairwise(moves))
    return [float(after) for _, after in moves]


def completion(programs: Path, model: Path, prompt: str, *flags: str | Path) -> tuple[str, str]:
    """The prompt with a greedy continuation, and the log."""
    greedy = ("-no-cnv", "--temp", "0", "-n", "12", "--ignore-eos", "-p", prompt)
    text, log = ran(programs / "llama-completion", "-m", model, *FLAGS, *greedy, *flags)
    return text.partition("llama_completion: saving")[0].rstrip(), log


def stages(log: str) -> str:
    """The log's last word on it."""
    return str(re.findall(r"elastic = (no|\d+ stages)", log)[-1])


def test_the_log_says_how_many_stages(programs: Path, files: tuple[Path, Path]) -> None:
    _, log = completion(programs, files[1], LONG)
    assert re.search(r"rope table += mrrope-pro, scale = 4, n_ctx_orig = 128", log)
    assert stages(log) == "8 stages"
    assert scales(log)[0] == pytest.approx(stage_scale(WINDOW + 1), rel=1e-4)
    assert scales(log) == sorted(scales(log))


def test_the_log_says_that_it_is_switched(programs: Path, files: tuple[Path, Path]) -> None:
    off, log = completion(programs, files[1], SHORT, "--rope-elastic", "off")
    assert (stages(log), scales(log)) == ("no", [])
    plain, elastic = files
    _, log = completion(programs, plain, SHORT, "--rope-elastic", "on", "--rope-scaling", "mrrope-pro")
    assert (stages(log), scales(log)) == ("8 stages", [])
    assert completion(programs, elastic.with_name("static.gguf"), SHORT)[0] == off


def test_inside_the_window_it_is_the_original(programs: Path, files: tuple[Path, Path]) -> None:
    plain, _ = completion(programs, files[0], SHORT)
    elastic, log = completion(programs, files[1], SHORT)
    assert elastic == plain
    assert scales(log) == []


def test_a_prompt_cache_opened_across_stages(programs: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    cache = ("--prompt-cache", tmp_path / "cache", "--prompt-cache-all")
    longer = f"{LONG} I keep"
    fresh = {prompt: completion(programs, files[1], prompt)[0] for prompt in (SHORT, longer)}
    completion(programs, files[1], SHORT, *cache)
    found, log = completion(programs, files[1], longer, *cache)  # grown after it was opened
    assert found == fresh[longer]
    assert "loaded a session with prompt size of 6" in log
    held = scales(log)[-1]
    found, log = completion(programs, files[1], f"{longer}{found[len(longer) :]}", *cache)  # opened at its stage
    assert "matches 33" in log or "exact match" in log
    assert all(scale >= held for scale in scales(log))
    found, log = completion(programs, files[1], SHORT, *cache)  # opened and cut
    assert found == fresh[SHORT]
    assert scales(log)[-1:] == [1.0]


def perplexity(programs: Path, model: Path, text: Path, n_batch: int, *flags: str) -> tuple[str, str]:
    """llama-perplexity's estimate over chunks of twice the window, as many at a time as n_batch holds, and its log."""
    chunks = ("-f", text, "-c", str(2 * WINDOW), "-b", str(n_batch), "-ub", str(n_batch))
    out, log = ran(programs / "llama-perplexity", "-m", model, "-t", "1", "--no-warmup", "-lv", "4", *chunks, *flags)
    return re.findall(r"Final estimate: PPL = ([\d.]+)", out + log)[0], log


def test_perplexity_of_chunks_in_parallel(programs: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    plain, elastic = files
    text = tmp_path / "text"
    text.write_text("\n".join([LONG] * 4))
    one, log = perplexity(programs, elastic, text, 2 * WINDOW)
    assert "n_seq=1" in log
    assert scales(log)[:2] == [pytest.approx(stage_scale(n), rel=1e-4) for n in (WINDOW + 1, 181)]
    assert scales(log).count(1.0) >= 3  # every chunk begins with the original model
    four, log = perplexity(programs, elastic, text, 8 * WINDOW)
    assert "n_seq=4" in log
    assert four == one
    static, _ = perplexity(programs, plain.with_name("static.gguf"), text, 4 * WINDOW)
    off, log = perplexity(programs, elastic, text, 4 * WINDOW, "--rope-elastic", "off")
    assert off == static != one
    assert scales(log) == []


def chat(programs: Path, model: Path, *flags: str) -> str:
    """What llama-cli answers to one message."""
    said = ("-p", "Hello there, what is a bee?", "-st", "-n", "24", "--temp", "0")
    flags = ("-t", "1", "-c", str(SCALE * WINDOW), "--no-warmup", *flags)
    out, _ = ran(programs / "llama-cli", "-m", model, *said, *flags)
    return out.partition("what is a bee?")[2].partition("[ Prompt")[0].strip()


def test_a_chat(programs: Path, files: tuple[Path, Path]) -> None:
    plain, elastic = files
    original, found = chat(programs, plain), chat(programs, elastic)
    assert len(original) > 40
    assert found == original
    off = chat(programs, elastic, "--rope-elastic", "off")
    assert off == chat(programs, plain.with_name("static.gguf")) != found
