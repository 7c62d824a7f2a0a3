"""For tests of the evaluations' prompts: a tokenizer of bytes, prose to hide needles in, a prompt read back as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mrrope_gguf.evals.essay import Essay, essay
from mrrope_gguf.evals.samples import Job, Pieces, Sample, Tokenizer
from mrrope_gguf.evals.scoring import METRICS

BOS = 256
PROSE = " ".join(f"Sentence {i} of this essay says {'very ' * (i % 4)}little, as one does." for i in range(23))


class Bytes:
    """A token for each byte, and BOS, 256, where it is asked for: lengths in tokens are lengths in bytes."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        assert not special, "a needle or a text must never turn into control tokens"
        return [BOS] * add_bos + list(text)


class Spacing(Bytes):
    """Puts a space before every text it is given, as SentencePiece vocabularies do."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return super().tokenize(b" " + text, add_bos, special)


def prose(name: str = "fixture") -> Essay:
    return essay(PROSE, name=name, tag="pd")


def written(sample: Sample, llm: Any = None) -> str:
    """The whole prompt as text."""
    return read(sample.tokens, llm)


def read(tokens: Iterable[int], llm: Any = None) -> str:
    """`tokens` as text; by a llama_cpp.Llama, or else as bytes, of which only the first may be BOS."""
    found = list(tokens)
    if llm is not None and not isinstance(llm, Bytes):
        return str(llm.detokenize(found).decode())
    return bytes(found[1:] if found[:1] == [BOS] else found).decode()


def job(tokenizer: Tokenizer, task: str, length: int, generate: int, seed: int = 42) -> Job:
    return Job(Pieces(tokenizer), task, "string_match_all", length, generate, seed, 0)


def score(sample: Sample, said: str) -> float:
    """The sample's own metric of the answer."""
    return METRICS[sample.metric](said, sample.references)
