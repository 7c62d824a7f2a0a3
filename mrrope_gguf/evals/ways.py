"""The ways to run one model past its context, by the names that commands and results give them.

Mode A is a static table of one scale S, written by the method's name; mode B (`yarn@B`) a static table for every length
L, S = max(1, L / n_ctx_orig); mode C is elastic. `none` is the model as it is, and `truncate` the same model given only
the last n_ctx_orig tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal

from ..errors import Refused
from ..tables import DEFAULT_METHOD, RopeTable, stored_factors, to_float32

if TYPE_CHECKING:
    from ..facts import RopeFacts

Kind = Literal["none", "static", "elastic", "truncate"]

STATIC = ("linear", "ntk", "yarn", "yarn-turns", "mrrope-uni", "mrrope-pro")
DEFAULT = DEFAULT_METHOD  # what plain `elastic` grows by, as a file does that `mrrope extend` wrote
ELASTIC, BY_LENGTH = "elastic:", "@B"
PLAIN: tuple[Kind, ...] = ("none", "truncate")
SAMPLED = (2.0, 4.0, 8.0, 16.0)  # the scales whose tables stand for all of a method's in mode B


@dataclass(frozen=True)
class Way:
    """How a model is run. `scale` is S of the full table, 1 for the model itself, None for mode B before `at`."""

    name: str
    kind: Kind
    method: str
    scale: float | None

    @property
    def by_length(self) -> bool:
        """Whether each length has a table of its own: mode B."""
        return self.scale is None

    @property
    def mode(self) -> str:
        """A, B or C, and "" for a way that has no table."""
        if self.kind == "static":
            return "B" if self.name.endswith(BY_LENGTH) else "A"
        return "C" if self.kind == "elastic" else ""

    @property
    def plain(self) -> bool:
        """Whether the model runs as it is, S = 1."""
        return self.kind in PLAIN or self.scale == 1.0

    def at(self, length: int | None, n_ctx_orig: int) -> Way:
        """This way at a length in tokens: mode B gets its scale there; every other way is what it was.

        Raises ValueError for mode B without a length.
        """
        if not self.by_length:
            return self
        if length is None:
            raise ValueError(f"{self.name} has a table for each length, and no length was given")
        return replace(self, scale=scale_of(length, n_ctx_orig))

    def table(self, facts: RopeFacts, model: str = "this model", *, force: bool = False) -> RopeTable | None:
        """The table at full scale, or None where the model runs as it is. `model` is its name, for errors.

        Raises Refused where the method cannot be had for it, ValueError for mode B before `at`.
        """
        if self.plain:
            return None
        if self.scale is None:
            raise ValueError(f"{self.name} has a table for each length: ask at(length, n_ctx_orig)")
        from ..extend import method_table

        return method_table(facts, model, self.method, self.scale, force=force)

    def table_sha256(self, facts: RopeFacts, *, force: bool = False) -> str | None:
        """sha256 of the float32 factors and temperature, in mode B of those at the scales in SAMPLED; None without."""
        ways = [replace(self, scale=s) for s in SAMPLED] if self.by_length else [self]
        tables = [way.table(facts, force=force) for way in ways]
        kept = [_bytes(table) for table in tables if table is not None]
        return hashlib.sha256(b"".join(kept)).hexdigest() if kept else None

    def to_json(self, facts: RopeFacts, *, force: bool = False) -> dict[str, object]:
        """What the head of a results file keeps of it."""
        sha256 = self.table_sha256(facts, force=force)
        return {"kind": self.kind, "method": self.method, "scale": self.scale, "table_sha256": sha256}


def reach(facts: RopeFacts, *, force: bool = False) -> int:
    """The tokens a model remembers as it is, from which scales count: n_ctx_orig of its tables.

    That is all it was trained for, unless `force` drops a scaling it was trained with.
    """
    existing = facts.existing_scaling
    return facts.n_ctx_orig if existing is None or (force and not existing.mergeable) else facts.n_ctx_train


def scale_of(length: int, n_ctx_orig: int) -> float:
    """S of mode B.

    >>> scale_of(4096, 8192), scale_of(24576, 8192)
    (1.0, 3.0)
    """
    return max(1.0, length / n_ctx_orig)


def known() -> list[str]:
    """Every name there is, as an error lists them."""
    return ["none", "truncate", *STATIC, *(m + BY_LENGTH for m in STATIC), "elastic", *(ELASTIC + m for m in STATIC)]


def parse(methods: str | Iterable[str], scale: float | None = None) -> list[Way]:
    """The ways of `--methods`, in the order given: names parted by commas, or a list of them.

    scale: S of the static and elastic tables; not needed by none, truncate and mode B. `elastic:mrrope-uni` is the
    default and is named `elastic`.
    Raises Refused for an unknown name, one given twice, none at all, and a scale that is missing or not above 1.

    >>> [(way.kind, way.method, way.scale) for way in parse("none,yarn,elastic", 4)]
    [('none', 'none', 1.0), ('static', 'yarn', 4.0), ('elastic', 'mrrope-uni', 4.0)]
    """
    names = [_canonical(name.strip()) for name in (methods.split(",") if isinstance(methods, str) else methods)]
    if not any(names):
        raise _refused("no method was named", "there is nothing to compare")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise _refused(f"the method {twice[0]!r} is named twice", f"results are kept by name: {', '.join(names)}")
    return [_way(name, scale) for name in names]


def _canonical(name: str) -> str:
    return "elastic" if name == ELASTIC + DEFAULT else name


def _way(name: str, scale: float | None) -> Way:
    if name not in known():
        raise _refused(f"unknown method {name!r}", "it is none of the ways to run a model")
    if name in PLAIN:
        return Way(name, "none" if name == "none" else "truncate", "none", 1.0)
    if name.endswith(BY_LENGTH):
        return Way(name, "static", name.removesuffix(BY_LENGTH), None)
    if scale is None or not (isfinite(scale) and scale > 1.0):
        raise Refused(
            f"{name}: how far should the context be stretched?",
            why=f"its table needs a scale above 1, and the scale is {'missing' if scale is None else f'{scale:g}'}",
            fix="--scale 4, or leave out every method but none and truncate",
        )
    if name == "elastic":
        return Way(name, "elastic", DEFAULT, float(scale))
    if name.startswith(ELASTIC):
        return Way(name, "elastic", name.removeprefix(ELASTIC), float(scale))
    return Way(name, "static", name, float(scale))


def _refused(what: str, why: str) -> Refused:
    listed = f"none, truncate, {', '.join(STATIC)}, any of these but the first two with {BY_LENGTH} (a table for each "
    return Refused(what, why=why, fix=f"--methods takes {listed}length), elastic, {ELASTIC}METHOD; each once")


def _bytes(table: RopeTable) -> bytes:
    """What an engine is given of a table: float32 factors (n_rot/2,), base factors included, and the temperature."""
    numbers: Sequence[float] = stored_factors(table.radix_values, table.base_factors, table.lead)
    return struct.pack(f"<{len(numbers) + 1}f", *numbers, to_float32(table.attn_factor))
