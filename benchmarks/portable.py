"""Which portable form costs a short context least in stock llama.cpp? Makes docs/format.md's table again.

    python -m benchmarks.portable     (about 8 minutes on 2 cores)

The original, the same table as rope_freqs.weight, and as longrope + rope_factors_long.weight (plain angles while
n_ctx <= original), with and without the temperature: perplexity inside the original window of SmolLM2-135M.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrrope_gguf import fetch
from mrrope_gguf.evals.losses import perplexity, token_nll
from mrrope_gguf.extend import extend, file_factors
from mrrope_gguf.facts import LONG
from mrrope_gguf.gguf.edit import Edit
from mrrope_gguf.gguf.source import Source
from mrrope_gguf.gguf.types import F32, ValueType
from mrrope_gguf.gguf.write import write_new
from mrrope_gguf.metadata import pack_f32, write_table
from mrrope_gguf.model import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCALE, WINDOW = 4.0, 8192


def longrope(source: Path, path: Path, attn_factor: float | None = None) -> Path:
    """The same table in the other portable form."""
    table = extend(source, path, scale=SCALE, dry_run=True).table
    factors = file_factors(table)
    with Source.open(source) as opened:
        edit = Edit(opened)
        write_table(edit, "llama", table, round(table.n_ctx_orig * SCALE), elastic=False)
        edit.set("llama.rope.scaling.type", ValueType.STRING, "longrope")
        attn = table.attn_factor if attn_factor is None else attn_factor
        edit.set("llama.rope.scaling.attn_factor", ValueType.FLOAT32, attn)
        edit.insert_tensor(LONG, (len(factors),), F32, pack_f32(factors))
        return write_new(edit, path).path


def measure(path: Path, text: str, n: int) -> NDArray[np.float32]:
    """Losses of the first `n` tokens, in a context of n."""
    llm: Any = load(path, n_ctx=n, past_window=True, flash_attn=False)
    losses = token_nll(llm, llm.tokenize(text.encode(), add_bos=True, special=False)[:n])
    llm.close()
    return losses


def main() -> None:
    os.environ["MRROPE_ENGINE"] = "stock"
    original, text = fetch.fetch(fetch.SMOLLM2), fetch.article(fetch.fetch(fetch.BRITANNICA))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            "original": original,
            "rope_freqs.weight": extend(original, folder / "freqs.gguf", scale=SCALE).path,
            "the same, attn_factor 1": extend(original, folder / "m1.gguf", scale=SCALE, attn_factor=1.0).path,
            "longrope + rope_factors_long.weight": longrope(original, folder / "long.gguf"),
            "the same with attn_factor 1": longrope(original, folder / "long1.gguf", 1.0),
        }
        print(f"{f'n_ctx {WINDOW}':<38}{f'0 to {WINDOW // 2}':>16}{f'0 to {WINDOW}':>16}")
        for label, path in files.items():
            losses = measure(path, text, WINDOW)
            print(f"{label:<38}{perplexity(losses, 0, WINDOW // 2):>16.2f}{perplexity(losses):>16.2f}", flush=True)
        print(f"{f'n_ctx {2 * WINDOW}':<38}{f'0 to {WINDOW}':>16}{f'{WINDOW} to {2 * WINDOW}':>16}")
        for label in list(files)[1:3]:
            losses = measure(files[label], text, 2 * WINDOW)
            print(f"{label:<38}{perplexity(losses, 0, WINDOW):>16.2f}{perplexity(losses, WINDOW):>16.2f}", flush=True)


if __name__ == "__main__":
    main()
