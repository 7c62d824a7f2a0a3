"""Tiny models of every architecture that llama.cpp's own test generator builds, and how engines are compared on them.

The generator is test-llama-archs of the patched tree; it stands in `bin` beside the patched library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests import stock

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mrrope_gguf.extend import Wish

    Floats = NDArray[np.float32]

SEED = "1"
N_CTX, N_TOKENS, N_VOCAB = 1024, 48, 128
FAR = 600  # past the 256 tokens the models are for, inside N_CTX


def program(lib: Path) -> Path:
    """test-llama-archs of the build whose libraries are in `lib`. AssertionError where it was not built."""
    path = lib.parent / "bin" / "test-llama-archs"
    assert path.exists(), f"{path} is missing: build with `mrrope build --tests`"
    return path


def generate(lib: Path, arch: str, folder: Path) -> list[Path]:
    """Write the models of one architecture, dense or with experts or both; none where the saver cannot."""
    folder.mkdir()
    run = subprocess.run(
        [program(lib), "-s", SEED, "-a", arch, "-o", folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return sorted(folder.glob("*.gguf"))


@dataclass(frozen=True)
class Line:
    """One line of test-llama-archs --rope-table: `kind key=value key=value ...`."""

    kind: str
    fields: dict[str, str]

    def __getitem__(self, key: str) -> str:
        return self.fields[key]

    def layers(self, key: str) -> tuple[int, ...]:
        """The layer numbers in a field such as `0,3`, or `-` for none."""
        return () if self[key] == "-" else tuple(int(n) for n in self[key].split(","))


def rope_report(lib: Path) -> dict[str, list[Line]]:
    """What `test-llama-archs --rope-table` says of each architecture: node by node, then the verdicts.

    AssertionError, with the last lines, where one ends the process.
    """
    run = subprocess.run(
        [program(lib), "--rope-table", "-s", SEED], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode in (0, 1), f"exit {run.returncode}\n{run.stdout[-500:]}\n{run.stderr[-2000:]}"
    report: dict[str, list[Line]] = {}
    for text in run.stdout.splitlines():
        if text.startswith("rope-"):
            kind, *fields = text.split()
            line = Line(kind, dict(field.split("=", 1) for field in fields if "=" in field))
            report.setdefault(line["arch"], []).append(line)
    return report


def tokens() -> list[int]:
    return [int(n) for n in np.random.default_rng(3).integers(0, N_VOCAB, N_TOKENS)]


def forward(path: str, factors: list[float] | None = None, attn_factor: float = 1.0, far: bool = True) -> Floats:
    """Logits (2*N_TOKENS, n_vocab) at the start of the context and, in an empty one, past the original window.

    The f16 cache and the attention that llama.cpp chooses by itself, as in ordinary use. `factors` sets a table first.
    """
    with stock.context(path, N_CTX, flash_attn_type=-1, type_k=1, type_v=1, n_threads=1) as (_model, ctx):
        import llama_cpp

        if factors is not None:
            from mrrope_gguf.engine.rope_table import set_factors

            set_factors(ctx, factors, attn_factor)
        parts = [stock.decode(ctx, tokens())]
        if far:
            if memory := llama_cpp.llama_get_memory(ctx):
                llama_cpp.llama_memory_clear(memory, True)
            parts.append(stock.decode(ctx, tokens(), first=FAR))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Grown:
    """What an extended file did in one context. `scales` are S after each step; a step left out is None.

    `near`: its first N_TOKENS. `far`: the last of FAR more, past the original window. `back`: those removed, and the
    last of the near ones decoded again. `again`: the memory emptied, the near ones once more.
    """

    on: bool
    scales: dict[str, float]
    logits: dict[str, Floats]


def grow(path: str) -> Grown:
    """Run a file within its window, past it, and back."""
    with stock.context(path, N_CTX, flash_attn_type=-1, type_k=1, type_v=1, n_threads=1) as (_model, ctx):
        import llama_cpp

        from mrrope_gguf.engine import get_elastic

        steps: dict[str, Floats] = {}
        scales: dict[str, float] = {}

        def step(name: str, given: list[int], first: int) -> None:
            steps[name] = stock.decode(ctx, given, first=first)[-N_TOKENS:]
            scales[name] = get_elastic(ctx).scale

        on, memory, last = get_elastic(ctx).on, llama_cpp.llama_get_memory(ctx), N_TOKENS - 1
        step("near", tokens(), 0)
        step("far", (tokens() * (FAR // N_TOKENS + 1))[:FAR], N_TOKENS if memory else 0)
        if memory and llama_cpp.llama_memory_seq_rm(memory, 0, last, -1):
            step("back", tokens()[last:], last)
        if memory:
            llama_cpp.llama_memory_clear(memory, True)
            step("again", tokens(), 0)
        return Grown(on, scales, steps)


@dataclass(frozen=True)
class Extension:
    """An extended file and the table that it carries."""

    path: str
    factors: list[float]
    attn_factor: float
    reexpressed: bool


def extended(path: Path, rendering: Wish, elastic: bool = False) -> Extension:
    """Extend a model fourfold, into a file beside it; its table is static unless `elastic`."""
    from mrrope_gguf.extend import extend, file_factors

    # forced: the generator gives some models long and short factors, which a table would not silently replace
    out = path.with_suffix(f".{rendering}.gguf")
    done = extend(path, out, scale=4.0, rendering=rendering, elastic=elastic, force=True)
    return Extension(
        str(done.path), file_factors(done.table), done.table.attn_factor, done.rendering.reexpress is not None
    )


def same_bits(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def same_as_stock(ours: Floats, theirs: Floats) -> bool:
    """The same bits. Under sanitizers recurrent layers are summed in another order: there nearly the same numbers."""
    if "MRROPE_TEST_SANITIZED" in os.environ:
        return ours.shape == theirs.shape and difference(ours, theirs) < 1e-4
    return same_bits(ours, theirs)


def difference(a: Floats, b: Floats) -> float:
    """The largest difference relative to the largest logit."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
