"""What benchmarks.elastic measures: losses by position and needles, one run at a time, each kept when it is finished.

Names of runs:
    ppl/MODEL/TEXT/WAY/END          mean losses of blocks of 256 positions, from END - 4096 to END
    needle/MODEL/HAY/SEED/TOKENS/WAY    ten numbers hidden in a text of TOKENS tokens, each asked for
WAY is a line of elastic_growth, or `truncate`: the model as it is, which reads the n_ctx_orig tokens before END.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.elastic_drift import Drift
from benchmarks.elastic_growth import Growth, Reader, parse
from benchmarks.elastic_models import MODELS, Measured, widened
from mrrope_gguf import texts
from mrrope_gguf.engine import loaded_library
from mrrope_gguf.errors import EngineTrouble
from mrrope_gguf.evals import snapshot
from mrrope_gguf.evals.decode import Decoder
from mrrope_gguf.evals.needles import ROOM, Haystack, answers, haystack
from mrrope_gguf.evals.runlog import RunLog
from mrrope_gguf.kernels import nll
from mrrope_gguf.model import load

BLOCK = 256


class Session:
    """One model, loaded once, and the runs made with it. States that runs share lie in `folder`."""

    def __init__(self, model: str, log: RunLog, folder: Path, threads: int) -> None:
        self.model: Measured = MODELS[model]
        self.name, self.log, self.folder, self.threads = model, log, folder, threads
        self.path = widened(self.model.resource)
        # plain attention: faster than flash attention on a CPU
        self.llm: Any = load(
            self.path,
            n_ctx=self.model.n_ctx,
            past_window=True,
            flash_attn=False,
            n_threads=threads,
            n_threads_batch=threads,
        )
        self._tokens: dict[str, list[int]] = {}
        self._drifting: Drift | None = None

    def run(self, name: str) -> None:
        """Make one run, if it has not been made."""
        if name in self.log.runs():
            return
        began = time.perf_counter()
        kind, _, *rest = name.split("/")
        if kind == "drift":
            found = self._drift(rest[0]).measure(rest[1], int(rest[2]))
        elif kind == "ppl":
            found = self._perplexity(rest[0], rest[1], int(rest[2]))
        else:
            found = self._needles(rest[0], int(rest[1]), int(rest[2]), rest[3])
        found["seconds"] = round(time.perf_counter() - began, 1)
        found["engine"] = loaded_library().commit
        self.log.add(name, found)
        print(name, found["seconds"], file=sys.stderr, flush=True)

    def _drift(self, kind: str) -> Drift:
        if self._drifting is None or self._drifting.kind != kind:
            self._drifting = Drift(self.path, kind, self.tokens("britannica"), self.threads)
        return self._drifting

    def tokens(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.llm.tokenize(texts.read(text).encode(), add_bos=True, special=False)
        return self._tokens[text]

    def _perplexity(self, text: str, way: str, end: int) -> dict[str, Any]:
        start, window = end - self.model.bucket, self.model.n_ctx_orig
        tokens = self.tokens(text)
        if way == "truncate":
            return self._truncated(tokens, end)
        growth = parse(way, window)
        if growth.kind == "elastic" and end <= window:
            raise ValueError(f"{way} to {end}: within the window it is `none`, bit for bit")
        with Decoder(self.llm) as decoder:
            reader = Reader(self.llm, self.path, decoder, growth)
            self._read_to(reader, decoder, growth, f"{self.name}-{text}", way, tokens, start)
            losses = _losses(reader, tokens, start, end)
            self._keep(decoder, f"{self.name}-{text}", way, end)
        return {"blocks": losses}

    def _truncated(self, tokens: list[int], end: int) -> dict[str, Any]:
        """The bucket that ends at `end`, by the model as it is, which sees the n_ctx_orig tokens before that end."""
        window, bucket = self.model.n_ctx_orig, self.model.bucket
        first = end - window
        shown = tokens[:1] + tokens[first + 1 : end + 1] if self._bos(tokens) else tokens[first : end + 1]
        with Decoder(self.llm) as decoder:
            reader = Reader(self.llm, self.path, decoder, parse("none", window))
            for _ in reader.logits(shown[: window - bucket], every=False):
                pass
            return {"blocks": _losses(reader, shown, window - bucket, window)}

    def _bos(self, tokens: list[int]) -> bool:
        return bool(tokens[0] == self.llm.token_bos())

    def _needles(self, hay: str, seed: int, length: int, way: str) -> dict[str, Any]:
        text = self.haystack(hay, seed, length)
        growth = parse(way, self.model.n_ctx_orig)
        with Decoder(self.llm) as decoder:
            reader = Reader(self.llm, self.path, decoder, growth)
            place = f"{self.name}-{hay}-{seed}-{length}"
            self._read_to(reader, decoder, growth, place, way, list(text.tokens), len(text.tokens))
            found = answers(self.llm, decoder, text)
        return {
            "loss": round(float(np.mean([a.loss for a in found])), 4),
            "exact": sum(a.exact for a in found),
            "losses": [round(a.loss, 3) for a in found],
            "recalled": [a.exact for a in found],
            "tokens": len(text.tokens),
            "scale": round(growth.stage(len(text.tokens))[1], 4),
        }

    def haystack(self, hay: str, seed: int, length: int) -> Haystack:
        return haystack(self.llm, length - ROOM, seed=seed, prose=None if hay == "noise" else texts.read(hay))

    def _read_to(
        self, reader: Reader, decoder: Decoder, growth: Growth, place: str, way: str, tokens: list[int], end: int
    ) -> None:
        """Have tokens[:end] read, from the longest state that was kept on."""
        window = self.model.n_ctx_orig
        kept = {int(p.stem.rsplit("-", 1)[1]): p for p in self.folder.glob(f"{_key(place, way)}-*.state")}
        if growth.kind == "elastic":
            shared = self._state(place, "none", window)
            if shared.exists():
                kept.setdefault(window, shared)
        at = max((n for n in kept if n <= end), default=0)
        reader.settle(at)
        if at:
            try:
                snapshot.restore(decoder, kept[at])
            except EngineTrouble:  # cut short, or of an older version: read it again
                kept[at].unlink()
                self._read_to(reader, decoder, growth, place, way, tokens, end)
                return
        plain = growth.kind != "static"
        stop = min(end, window) if plain else end
        if at < stop:
            for _ in reader.logits(tokens[at:stop], every=False):
                pass
            if plain and stop == window:
                snapshot.save(decoder, self._state(place, "none", window))
        if decoder.n_past < end:
            for _ in reader.logits(tokens[decoder.n_past : end], every=False):
                pass

    def _keep(self, decoder: Decoder, place: str, way: str, end: int) -> None:
        """The state after this run, for the next one; the one before it goes, unless it is shared."""
        snapshot.save(decoder, self._state(place, way, end))
        for old in self.folder.glob(f"{_key(place, way)}-*.state"):
            n = int(old.stem.rsplit("-", 1)[1])
            if n < end and not (way == "none" and n == self.model.n_ctx_orig):
                old.unlink(missing_ok=True)

    def _state(self, place: str, way: str, n: int) -> Path:
        return self.folder / f"{_key(place, way)}-{n}.state"


def _key(place: str, way: str) -> str:
    return f"{place}-{hashlib.sha256(way.encode()).hexdigest()[:12]}"


def _losses(reader: Reader, tokens: list[int], start: int, end: int) -> list[float]:
    """Mean losses of blocks of BLOCK positions from start to end; position i predicts tokens[i + 1]."""
    targets = np.asarray(tokens[start + 1 : end + 1], dtype=np.int64)
    if len(targets) < end - start:
        raise ValueError(f"the text has {len(tokens)} tokens, {end + 1} are needed")
    found = np.empty(len(targets), dtype=np.float32)
    at = 0
    for logits in reader.logits(tokens[start:end], every=True):
        found[at : at + len(logits)] = nll(logits, targets[at : at + len(logits)])
        at += len(logits)
    return [round(float(x), 6) for x in found.reshape(-1, BLOCK).mean(1, dtype=np.float64)]
