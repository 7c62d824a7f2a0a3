"""How the next token is chosen: llama.cpp's own samplers, by its names, in its order and with its defaults."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

from .. import engine
from ..errors import Refused
from ..text import printable

RANDOM = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
_LARGEST = 2**32


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampling parameters. temp=0 takes the likeliest token. seed=-1 is another one each time.

    n_predict: most tokens of an answer, -1 for as many as the context holds. reverse_prompt: texts that end an answer.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exp: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1
    n_predict: int = -1
    reverse_prompt: tuple[str, ...] = ()

    def but(self, **changes: Any) -> Sampling:
        """The same with other values. Raises Refused for a name that is none, or a value out of its range."""
        known = {field.name: field for field in fields(self)}
        for name, value in changes.items():
            if name not in known:
                what = f"{printable(name)}: no sampling parameter"
                raise Refused(what, why=f"there are: {', '.join(known)}", fix="take one")
            if name == "reverse_prompt":
                changes[name] = _texts(value)
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise Refused(f"{name}={_shown(value)}", why="it is no number", fix="give a number")
            elif not -_LARGEST <= value <= _LARGEST:
                raise Refused(f"{name}={_shown(value)}", why="it does not fit 32 bits", fix="give a smaller number")
            elif isinstance(known[name].default, int) and int(value) != value:
                raise Refused(f"{name}={value!r}", why="it counts something", fix="give a whole number")
            elif name == "n_predict" and value == 0:
                raise Refused("n_predict=0", why="an answer has a token at least", fix="ChatSession.read reads alone")
        return replace(self, **changes)


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise Refused(f"reverse_prompt={_shown(value)}", why="it is no text and no list of texts", fix="give texts")
    return tuple(texts)


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), limit=60)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"


class Sampler:
    """llama.cpp's samplers for one answer; a context manager. `recent`: tokens that penalties look back on."""

    def __init__(self, sampling: Sampling, n_vocab: int, recent: Iterable[int] = ()) -> None:
        self._api = engine.llama_cpp().llama_cpp
        params = self._api.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = self._api.llama_sampler_chain_init(params)
        self.seed = sampling.seed if sampling.seed >= 0 else secrets.randbelow(RANDOM)
        for one in self._samplers(sampling, n_vocab):
            self._api.llama_sampler_chain_add(self._chain, one)
        for token in recent:
            self._api.llama_sampler_accept(self._chain, token)

    def sample(self, ctx: Any) -> int:
        """The next token, from the logits of what was decoded last."""
        return int(self._api.llama_sampler_sample(self._chain, ctx, -1))

    def close(self) -> None:
        if self._chain is not None:
            self._api.llama_sampler_free(self._chain)
            self._chain = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _samplers(self, s: Sampling, n_vocab: int) -> Iterable[Any]:
        """As common_sampler_init chains them: penalties, top_n_sigma, top_k, typ_p, top_p, min_p, xtc, temperature."""
        api = self._api
        if s.repeat_last_n and (s.repeat_penalty != 1 or s.presence_penalty or s.frequency_penalty):
            yield api.llama_sampler_init_penalties(
                n_vocab, int(s.repeat_last_n), s.repeat_penalty, s.frequency_penalty, s.presence_penalty
            )
        if s.temp <= 0:
            yield api.llama_sampler_init_greedy()
            return
        if s.top_n_sigma > 0:
            yield api.llama_sampler_init_top_n_sigma(s.top_n_sigma)
        if s.top_k > 0:
            yield api.llama_sampler_init_top_k(int(s.top_k))
        if s.typical_p < 1:
            yield api.llama_sampler_init_typical(s.typical_p, 1)
        if s.top_p < 1:
            yield api.llama_sampler_init_top_p(s.top_p, 1)
        if s.min_p > 0:
            yield api.llama_sampler_init_min_p(s.min_p, 1)
        if s.xtc_probability > 0:
            yield api.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, self.seed & RANDOM)
        yield api.llama_sampler_init_temp_ext(s.temp, s.dynatemp_range, s.dynatemp_exp)
        yield api.llama_sampler_init_dist(self.seed & RANDOM)
