"""What holds for the patched engine on any device, checked on tiny models and their CPU results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mrrope_gguf import tables
from mrrope_gguf.extend import extend
from tests import tiny
from tests.backends import F16, F32, Q8_0, SCENARIOS, Job, Result, distance

WINDOW, SCALE = 64, 4
CACHES = {F32: "f32", F16: "f16", Q8_0: "q8_0"}
# how far re-rotated keys may move the logits of one layer (a token's table lies near 1): the cache's own rounding
PRECISION = {F32: 1e-4, F16: 5e-3, Q8_0: 6e-2}


def model(folder: Path, arch: str, n_layer: int | None = None) -> Path:
    """A tiny model of 64 tokens with heads of 64, which whole q8_0 blocks make."""
    return tiny.make(
        folder / f"{arch}.gguf", arch, n_layer=n_layer, n_embd=128, n_head=2, n_head_kv=1, head_dim=64, n_ctx=WINDOW
    )


def job(path: Path, tokens: list[int] | None = None, n_ctx_orig: int = WINDOW, base: float = 1e4, **kw: Any) -> Job:
    """Three windows of tokens under mrrope-pro's table for four."""
    table = tables.rope_table("mrrope-pro", n_rot=64, freq_base=base, n_ctx_orig=n_ctx_orig, scale=SCALE)
    given = tuple(tokens or tiny.tokens(3 * WINDOW))
    return Job(path, given, tuple(map(float, table.factors)), table.attn_factor, **kw)


def elastic_job(folder: Path, arch: str, n_layer: int | None = None, **kw: Any) -> Job:
    """Three windows of tokens through an extended file: its table grows on the way."""
    path = extend(model(folder, arch, n_layer), folder / "elastic.gguf", scale=SCALE, method="mrrope-uni").path
    return Job(path, tuple(kw.pop("tokens", None) or tiny.tokens(3 * WINDOW)), (), 1.0, only=("plain",), **kw)


def stages(result: Result) -> list[float]:
    """The scales that the log says a context went through, in turn."""
    return [
        float(scale) for scale in re.findall(r"rope_elastic_update: \d+ positions, scale \S+ -> ([\d.]+)", result.log)
    ]


def ran_on(result: Result, *backends: str) -> None:
    """All layers, the cache and every rotation were on `backends`, and each had some; re-rotations and shifts too."""
    assert result.offloaded
    assert result.offloaded[0] == result.offloaded[1]
    assert result.cache == set(backends)
    # a graph that is used again is not logged again, so only what follows a change is left out
    for phase in (*SCENARIOS, "before"):
        assert set(result.rope[phase]) == set(backends), phase


def same_as_cpu(result: Result, cpu: Result, tolerance: float) -> None:
    """Each scenario's logits are the CPU's within `tolerance`, and the table moves them much further than that."""
    for name in SCENARIOS:
        assert distance(result[name], cpu[name]) <= tolerance, name
    later = len(cpu["rerotated"])
    for name, without in (("table", cpu["plain"]), ("rerotated", cpu["plain"][-later:]), ("shifted", cpu["restored"])):
        assert distance(result[name], without) > 10 * tolerance, name


def exact_in_one_layer(result: Result, cache: int, noise: float = 0) -> None:
    """Where keys depend on tokens alone, a change of the cache gives what the same tokens give afresh.

    `noise` is what the device's own rounding makes of another batch of the same tokens.
    """
    later = len(result["rerotated"])
    limit = max(PRECISION[cache], noise)
    assert distance(result["rerotated"], result["table"][-later:]) <= limit
    assert distance(result["restored"], result["plain"][-later:]) <= limit
    assert distance(result["shifted"], result["afresh"]) <= limit
    assert distance(result["holes"], result["holes_afresh"]) <= limit
    # had the keys been left alone, these would be equal instead
    assert distance(result["rerotated"], result["plain"][-later:]) > 4 * limit
