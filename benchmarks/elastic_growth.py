"""Ways to choose S while a text is read, named by one line of text. `Reader` reads a text by one of them.

none                                   the model as it is
static,method=mrrope-uni,scale=4       one table from the first token on
elastic,method=mrrope-uni,step=1.1892,room=1.33,t=1
    plain up to n_ctx_orig; stages end there and then at `step` times as many tokens each (`step=+1024`: so many
    tokens more); a stage that ends at b tokens has S = min(4, room * b / n_ctx_orig), the last one 4; attn_factor
    is 1 + t * 0.1 ln S
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrrope_gguf import engine
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.facts import read_facts
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.tables import RopeTable, rope_table

SCALE = 4.0
_METHODS = {"uni": "mrrope-uni", "pro": "mrrope-pro"}


@dataclass(frozen=True)
class Growth:
    """One way, for a model of n_ctx_orig tokens. kind: none, static or elastic."""

    kind: str
    n_ctx_orig: int
    options: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        name = self.options.get("method", "mrrope-uni")
        return _METHODS.get(name, name)

    def bounds(self) -> list[int]:
        """Where stages end, n_ctx_orig first; the last one is the file's whole context."""
        step, whole = self.options.get("step", "1.189207"), round(self.n_ctx_orig * SCALE)
        bounds = [self.n_ctx_orig]
        while bounds[-1] < whole:
            k = len(bounds)
            more = (
                int(step) * k + self.n_ctx_orig
                if step[0] == "+"
                else math.floor(self.n_ctx_orig * float(step) ** k + 0.5)
            )
            bounds.append(min(more, whole))
        return bounds

    def bound(self, n: int) -> int:
        """The end of the stage in which n tokens are held; a static table has one stage without end."""
        if self.kind != "elastic":
            return 2**31
        return next(b for b in self.bounds() if n <= b)

    def scale(self, n: int) -> float:
        """S while n tokens are held."""
        if self.kind == "static":
            return float(self.options.get("scale", SCALE))
        if self.kind == "none" or n <= self.n_ctx_orig:
            return 1.0
        bound = self.bound(n)
        if bound == self.bounds()[-1]:
            return SCALE
        return min(SCALE, float(self.options.get("room", "1.33")) * bound / self.n_ctx_orig)


def parse(text: str, n_ctx_orig: int) -> Growth:
    kind, *options = text.split(",")
    if kind not in ("none", "static", "elastic"):
        raise ValueError(f"{text!r}: a way begins with none, static or elastic")
    return Growth(kind, n_ctx_orig, dict(option.split("=") for option in options))


class Reader:
    """Reads one sequence of `llm`, whose file is `path`, the table following `growth`. Nothing is held at first."""

    def __init__(self, llm: Any, path: Any, decoder: Decoder, growth: Growth) -> None:
        self._llm, self._decoder, self._growth = llm, decoder, growth
        with open_gguf(path) as index:
            self._facts = read_facts(index)
        self._scale = 0.0

    def table(self, scale: float) -> RopeTable | None:
        """None is the model as it is."""
        if scale == 1.0:
            return None
        return rope_table(
            self._growth.method, n_rot=self._facts.n_rot, freq_base=self._facts.freq_base,
            n_ctx_orig=self._facts.n_ctx_orig, scale=scale,
            attn_factor=1 + float(self._growth.options["t"]) * 0.1 * math.log(scale)
            if "t" in self._growth.options else None,
        )  # fmt: skip

    def settle(self, n: int) -> None:
        """Turn by the table of n tokens."""
        scale = self._growth.scale(max(n, 1))
        if scale != self._scale:
            engine.set_table(self._llm, self.table(scale))
            self._scale = scale

    def logits(self, tokens: Sequence[int], every: bool) -> Iterator[Any]:
        """As Decoder.logits, in pieces that end where stages do."""
        done = 0
        while done < len(tokens):
            held = self._decoder.n_past
            end = min(len(tokens), done + self._growth.bound(held + 1) - held)
            self.settle(held + end - done)
            for logits in self._decoder.logits(tokens[done:end], every=every):
                if every or end == len(tokens):
                    yield logits
            done = end
