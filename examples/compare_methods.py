"""Compare ways to run one model past its context, from Python: perplexity by position, and numbers hidden in a text.

    python examples/compare_methods.py model.gguf book.txt [tokens]

Every way is a plain llama_cpp.Llama: the model as it is, and one extended file for each method. `mrrope eval` does this
for all methods in one load, resumes and reports; this shows the calls that it is made of.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mrrope_gguf
from mrrope_gguf import evals
from mrrope_gguf.progress import Bar

METHODS = ("none", "yarn", "mrrope-uni", "mrrope-pro")
SCALE = 4


def files(model: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each way's name and file."""
    for method in METHODS:
        if method == "none":
            yield method, model
        else:
            yield method, mrrope_gguf.extend(model, folder / f"{method}.gguf", method=method, scale=SCALE).path


def main() -> None:
    model, text = Path(sys.argv[1]), Path(sys.argv[2])
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 12288
    width = max(tokens // 4, 64)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files(model, Path(folder)):
            # elastic=False: hold each method's full table from the first token on, so that tables are compared
            static = None if name == "none" else False
            llm = mrrope_gguf.load(path, n_ctx=tokens, past_window=True, elastic=static)
            with Bar(f"{name}: reading", ("tok", 1)) as bar:
                read = evals.perplexity(llm, text, n_tokens=tokens, progress=bar)
            with Bar(f"{name}: asking", ("tok", 1)) as bar:
                asked = evals.needle(llm, [tokens], depths=(0.1, 0.5, 0.9), progress=bar)
            by_position = "  ".join(f"{middle}: {value:.2f}" for middle, value in read.buckets(width))
            print(f"{name:<11} perplexity {by_position}   needles {asked.score:.0%}, loss {asked.loss:.2f}")
            llm.close()


if __name__ == "__main__":
    main()
