"""A long conversation for tests of elastic context, and a real model whose window it soon outgrows."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from mrrope_gguf.extend import extend
from mrrope_gguf.gguf.index import open_gguf

WINDOW, SCALE = 128, 4  # stages end at 128, 152, 181, 215, 256, 304 and 362 tokens; from there on S = 4

TURNS = (
    "My name is Ada and I keep bees. I have three hives: a white one by the gate, a blue one under the apple tree and "
    "a green one at the end of the meadow, near the stream. Please say in one sentence what a beehive is.",
    "Last spring the blue hive lost its queen. The bees were restless for two weeks, they stopped building comb, and I "
    "was about to join them with the white hive when I saw that they had raised a new queen of their own. Since then "
    "it has been the strongest of the three. In one sentence: what does a queen bee do?",
    "In summer I took forty kilograms of honey from the white hive, fifty-two from the blue one and only eighteen from "
    "the green one, where the stream had flooded the stand and the bees had spent their time drying the floor. I sold "
    "most of it at the market in town, and gave the rest to my neighbours, who lent me a ladder. How is honey made?",
    "Now it is autumn and I feed them sugar syrup, close the entrances so that no mouse gets in, and put a stone on "
    "each roof against the wind. In winter the bees sit together in a ball and take turns to be outside, where it is "
    "cold. I listen at the wall of each hive once a week. How do bees keep warm in winter?",
    "When the willows bloom I shall open the hives again, and look whether each of them has a queen and enough to eat. "
    "What colour was the hive that lost its queen, and what is my name?",
)


def stage_scale(n_tokens: int) -> float:
    """S of a context of n_tokens tokens, by the engine's default policy."""
    length = float(WINDOW)
    if n_tokens <= length:
        return 1.0
    while n_tokens > round(length):
        length *= 2**0.25
    return min(SCALE, 1.33 * length / WINDOW)


def small_window(source: Path, target: Path, n_ctx: int = WINDOW) -> Path:
    """`source` as if it had been trained for n_ctx tokens: a real tokenizer and real answers, and stages come early."""
    with open_gguf(source) as index:
        record = index.kvs[f"{index.arch}.context_length"]
        assert index.get(record.key) == 8192
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        file.seek(record.value)
        file.write(struct.pack("<I", n_ctx))
    return target


def elastic_pair(source: Path, folder: Path) -> tuple[Path, Path]:
    """A model with a window of WINDOW tokens, and the same extended SCALE times."""
    plain = small_window(source, folder / "plain.gguf")
    return plain, extend(plain, folder / "elastic.gguf", scale=SCALE).path
