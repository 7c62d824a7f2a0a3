"""Ask a model about a text longer than its context, from Python.

    python examples/ask_a_text.py model.gguf book.txt "Who was the author's father?"

The model is extended just far enough, beside itself (a header and a reflink or a copy), then read and asked.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mrrope_gguf
from mrrope_gguf.model import prefill
from mrrope_gguf.progress import Bar

ANSWER = 64  # tokens


def tokenize(model: Path, prompt: str) -> list[int]:
    """The prompt's tokens, from a model that is opened for its vocabulary alone."""
    llm = mrrope_gguf.load(model, vocab_only=True)
    tokens: list[int] = llm.tokenize(prompt.encode(), add_bos=True, special=False)
    llm.close()
    return tokens


def main() -> None:
    model, text, question = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8"), sys.argv[3]
    tokens = tokenize(model, f"{text}\n\nQuestion: {question}\nAnswer:")
    wanted = len(tokens) + ANSWER
    facts = mrrope_gguf.inspect(model).facts
    has = facts.n_ctx_train if facts else 0
    if wanted > has:
        model = mrrope_gguf.extend(model, n_ctx=-(-wanted // 1024) * 1024, force=True).path
        print(f"{wanted} tokens do not fit in {has}: extended to {model.name}", file=sys.stderr)

    llm = mrrope_gguf.load(model, n_ctx=wanted)
    with Bar("reading", ("tok", 1)) as bar:
        prefill(llm, tokens[:-1], bar)
    for chunk in llm.create_completion(tokens, max_tokens=ANSWER, temperature=0.0, stream=True, stop=["\n"]):
        print(chunk["choices"][0]["text"], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
