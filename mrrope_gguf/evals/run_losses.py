"""Runs a pass that reads a text: its losses (ppl), or how far its guesses are from the original model's (kl)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import engine
from ..aside import private_folder
from ..errors import MrropeError
from ..kernels import nll
from ..meter import Meter, Span, size
from ..paths import cache_dir
from ..user_key import sweep_temps
from . import snapshot
from .decode import CHUNK, Decoder
from .host import Host
from .original import original
from .passes import Done, Emit, LossPass, Tick
from .passes import Result as Cell
from .spec import BLOCK, Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

STATE_LIMIT = 2 << 30  # bytes; a larger state costs more to keep between cells than to make again


class LossRun:
    """One pass on one host. `emit` gets each finished cell; `meter`, if any, learns from each chunk."""

    def __init__(self, host: Host, spec: Spec, task: LossPass, emit: Emit, tick: Tick, meter: Meter | None) -> None:
        self.host, self.spec, self.task, self.emit, self.tick, self.meter = host, spec, task, emit, tick, meter
        self.read = self.total = 0

    def run(self, done: Done) -> None:
        """Make the cells that are missing."""
        left = self.task.missing(done)
        if not left:
            return
        self.total = size(self.task.spans(done))
        llm = self.host.switch(self.spec.way(self.task.way), self.task.length)
        tokens = text_tokens(llm, self.spec, self.task.text, self.task.end)
        if self.task.task == "kl":
            with (
                original(self.host, llm, max(self.task.end, CHUNK)) as plain,
                Decoder(llm) as decoder,
                Decoder(plain) as other,
            ):
                self._diverge(decoder, other, tokens, left)
        elif self.task.way == "truncate":
            with Decoder(llm) as decoder:
                for cell in left:
                    parts = [self._truncated(llm, decoder, tokens, *part) for part in self.task.parts(*cell)]
                    self._keep(*cell, [loss for part in parts for loss in part.tolist()])
        else:
            with Decoder(llm) as decoder:
                self._losses(decoder, tokens, left)

    def _losses(self, decoder: Decoder, tokens: Sequence[int], left: list[tuple[int, int]]) -> None:
        states = States(self.host, self.spec, self.task)
        if states.restore(decoder, left[0][0]):
            self._count(decoder.n_past)
        self._skip(decoder, tokens, left[0][0])
        for start, end in left:
            self._skip(decoder, tokens, start)
            self._keep(start, end, self._read(decoder, tokens[start : end + 1]))
            if end != self.task.end or self.task.goes_on:
                states.save(decoder)
        if not self.task.goes_on:
            states.remove()

    def _truncated(self, llm: Any, decoder: Decoder, tokens: Sequence[int], start: int, end: int) -> Floats:
        """Losses of start..end where the model, as it is, sees no more than the n_ctx_orig tokens before `end`."""
        if end <= self.task.window:
            self._skip(decoder, tokens, start)
            return self._read(decoder, tokens[start : end + 1])
        first = end - self.task.window
        shown = list(tokens[first : end + 1])
        if tokens[0] == llm.token_bos():
            shown[0] = tokens[0]
        decoder.clear()
        self._skip(decoder, shown, start - first, cells=())
        return self._read(decoder, shown[start - first :])

    def _diverge(self, decoder: Decoder, other: Decoder, tokens: Sequence[int], left: list[tuple[int, int]]) -> None:
        """KL(original || way) of every position, chunk by chunk: neither model's logits are ever kept."""
        import numpy as np

        for start, end in left:
            for each in (decoder, other):
                self._skip(each, tokens, start)
            found = np.empty(end - start, dtype=np.float64)
            for at in range(start, end, decoder.chunk):
                part = tokens[at : min(at + decoder.chunk, end)]
                (theirs,) = self._timed(other, part, every=True)
                (ours,) = self._timed(decoder, part, every=True)
                found[at - start : at - start + len(part)] = divergence(theirs, ours)
            self._keep(start, end, found)

    def _skip(
        self, decoder: Decoder, tokens: Sequence[int], to: int, cells: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Read up to `to` in the batches of a pass that keeps every cell, so that what follows has the same bits."""
        ends = {end for _, end in (self.task.cells if cells is None else cells) if decoder.n_past < end < to}
        for end in sorted({*ends, to}):
            for _ in self._timed(decoder, tokens[decoder.n_past : end], every=False):
                pass

    def _read(self, decoder: Decoder, tokens: Sequence[int]) -> Floats:
        """Losses of tokens[1:], each after all that stands before it."""
        import numpy as np

        targets = np.asarray(tokens[1:], dtype=np.int64)
        found = np.empty(len(targets), dtype=np.float32)
        at = 0
        for logits in self._timed(decoder, tokens[:-1], every=True):
            found[at : at + len(logits)] = nll(logits, targets[at : at + len(logits)])
            at += len(logits)
        return found

    def _timed(self, decoder: Decoder, tokens: Sequence[int], *, every: bool) -> Iterator[Floats]:
        """decoder.logits, a chunk at a time, so that each is counted and timed."""
        for at in range(0, len(tokens), decoder.chunk):
            part = tokens[at : at + decoder.chunk]
            began, position = time.perf_counter(), decoder.n_past
            found = list(decoder.logits(part, every=every))
            if self.meter and len(part) >= min(BLOCK, decoder.chunk):
                self.meter.add(Span(position, len(part)), time.perf_counter() - began)
            self._count(len(part))
            yield from found if every else ()

    def _count(self, n: int) -> None:
        self.read += n
        self.tick(self.read, max(self.total, self.read))

    def _keep(self, start: int, end: int, values: Sequence[float] | Floats) -> None:
        import numpy as np

        blocks = [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]
        cells = [round(float(np.mean(block, dtype="float64")), 6) for block in blocks]
        found: Cell = {
            "task": self.task.task, "text": self.task.text, "way": self.task.way, "start": start, "end": end,
            "blocks": cells,
        }  # fmt: skip
        self.emit(self.task.key(start, end), found)


def divergence(theirs: Floats, ours: Floats) -> Any:
    """KL(theirs || ours) of each row of logits, float64 (n,), in nats.

    >>> import numpy as np
    >>> divergence(np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.25, 0.75]]))).round(4)
    array([0.1438])
    """
    import numpy as np

    out = np.empty(len(theirs), dtype=np.float64)
    for at in range(0, len(theirs), 32):  # a few rows at a time: copies stay small beside the logits
        p, q = (_log_softmax(rows[at : at + 32]) for rows in (theirs, ours))
        out[at : at + 32] = (np.exp(p) * (p - q)).sum(1)
    return out


def _log_softmax(rows: Floats) -> Any:
    import numpy as np

    x = rows.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x


def text_tokens(llm: Any, spec: Spec, name: str, end: int) -> list[int]:
    """The first end + 1 tokens of a text, BOS first where the model has one.

    Raises MrropeError if the text is shorter.
    """
    tokens = list(llm.tokenize(spec.text(name).read().encode(), add_bos=True, special=False))
    if len(tokens) < end + 1:
        raise MrropeError(
            f"{name}: the text is shorter than the longest length",
            why=f"it has {len(tokens)} tokens of this model's, and {end} positions need {end + 1}",
            fix=f"--lengths up to {len(tokens) - 1}, or a longer text (`mrrope texts`)",
        )
    return tokens[: end + 1]


class States:
    """The cache of a pass between two of its cells, on disk, so that a pass that was cut off need not begin anew."""

    def __init__(self, host: Host, spec: Spec, task: LossPass) -> None:
        way = spec.way(task.way).at(task.length, host.n_ctx_orig).to_json(host.facts, force=spec.force)
        text = spec.text(task.text).sha256
        made = repr((spec.sha256, way, text, sorted(spec.options.items()), str(engine.loaded_library().path)))
        self.say = host.say
        self.path = cache_dir() / "evals" / f"{hashlib.sha256(made.encode()).hexdigest()[:32]}.state"

    def save(self, decoder: Decoder) -> None:
        """Keep what the decoder holds; what cannot be kept is made again."""
        if decoder.api.llama_state_seq_get_size(decoder.ctx, 0) > STATE_LIMIT:
            return
        try:
            private_folder(self.path.parent)
            snapshot.save(decoder, self.path)
        except (OSError, MemoryError, MrropeError):
            self.remove()

    def restore(self, decoder: Decoder, most: int) -> bool:
        """Whether a state of at most `most` tokens was put back."""
        try:
            with open(self.path, "rb") as file:
                n = int.from_bytes(file.read(8), "little")
            if not 0 < n <= most:
                return False
            snapshot.restore(decoder, self.path)
        except OSError:
            return False
        except MrropeError as error:
            self.say(f"note: {error.what}: {error.why}")
            self.remove()
            decoder.clear()
            return False
        return True

    def remove(self) -> None:
        with suppress(OSError):  # what stays is replaced, or refused, or goes with the next pass
            self.path.unlink(missing_ok=True)
            for aside in Path(self.path.parent).glob(f"{self.path.stem}.*.tmp"):
                aside.unlink(missing_ok=True)
            sweep_temps(self.path.parent)
