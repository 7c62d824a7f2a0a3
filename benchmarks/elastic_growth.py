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
from mrrope_gguf.tables import RopeTable, rope_table, to_float32

SCALE = 4.0
_ENDLESS = 2**31
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

    def stages(self) -> list[tuple[int, float]]:
        """(end, S) of each stage, the plain one first. In doubles from float32 options, as the engine computes them."""
        step, room = self.options.get("step", "1.189207"), to_float32(float(self.options.get("room", "1.33")))
        found, length = [(self.n_ctx_orig, 1.0)], float(self.n_ctx_orig)
        while True:
            length = length + int(step) if step[0] == "+" else length * to_float32(float(step))
            scale = room * length / self.n_ctx_orig
            if scale >= SCALE * 0.999 or length >= self.n_ctx_orig * SCALE * 0.999:
                return [*found, (_ENDLESS, SCALE)]
            found.append((math.floor(length + 0.5), scale))

    def stage(self, n: int) -> tuple[int, float]:
        """(end, S) while n tokens are held; a way that is not elastic has one stage."""
        if self.kind != "elastic":
            return _ENDLESS, float(self.options.get("scale", SCALE)) if self.kind == "static" else 1.0
        return next(stage for stage in self.stages() if n <= stage[0])


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
        _, scale = self._growth.stage(n)
        if scale != self._scale:
            engine.set_table(self._llm, self.table(scale))
            self._scale = scale

    def logits(self, tokens: Sequence[int], every: bool) -> Iterator[Any]:
        """As Decoder.logits, in pieces that end where stages do."""
        done = 0
        while done < len(tokens):
            held = self._decoder.n_past
            end = min(len(tokens), done + self._growth.stage(held + 1)[0] - held)
            self.settle(held + end - done)
            for logits in self._decoder.logits(tokens[done:end], every=every):
                if every or end == len(tokens):
                    yield logits
            done = end
