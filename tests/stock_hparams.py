"""What stock llama.cpp makes of a header: it loads files without tensors, and its log is read before it gives up.

`read_all` runs this file as a child process, since a header that llama.cpp asserts on takes its process down.
Keys a loader demands beyond those given are added as it names them, so a case only states what matters to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from tests.tiny import add_key, finish

BASE = {
    "context_length": 4096,
    "embedding_length": 64,
    "block_count": 8,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
FLOATS = re.compile(
    r"epsilon|_eps$|_scale|scale$|freq_base|factor|clamp|bias|softcap|lower_bound|temperature_scale|norm_w"
)
_LINE = re.compile(r"print_info: (\w[\w ]*?)\s+= (.*)")
_LAYER = re.compile(r"layer\s+(\d+) assigned to device .*is_swa = (\d)")


def write(path: Path, arch: str, keys: dict[str, Any]) -> Path:
    """A header without tensors: `keys` are the architecture's, ints as u32, bools, floats as f32, lists as arrays."""
    writer = GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_uint32(f"{arch}.vocab_size", 32)
    for name, value in keys.items():
        add_key(writer, name if name.startswith("xielu.") else f"{arch}.{name}", value)
    return finish(writer, path)


def read_all(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """llama.cpp's view of each (architecture, keys): the log's values by name, `sliding` by layer, completed `keys`.

    {"error": ...} where it could not be brought to load the header, {"aborted": True} where it took the process down.
    """
    results: list[dict[str, Any]] = []
    while len(results) < len(cases):
        wanted = json.dumps(cases[len(results) :])
        child = subprocess.run(
            [sys.executable, "-m", "tests.stock_hparams"],
            input=wanted,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        results += [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        if len(results) < len(cases):
            results.append({"aborted": True, "error": child.stderr[-500:]})
    return results


def _load(path: Path) -> list[str]:
    import llama_cpp

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(callback, None)
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        llama_cpp.llama_model_free(model)
    return lines


def _guess(key: str, keys: dict[str, Any]) -> Any:
    if key.endswith(("sliding_window_pattern", "indexer.types", "compress_ratios", "rope_pattern")):
        return [i % 2 == 0 for i in range(keys["block_count"])]
    if key.endswith("dimension_sections"):
        return [4, 2, 2, 0]
    return 1.0 if FLOATS.search(key) else 2


def _complete(path: Path, arch: str, keys: dict[str, Any]) -> dict[str, Any]:
    keys = dict(keys)
    for _ in range(60):
        text = "".join(_load(write(path, arch, keys)))
        missing = re.search(rf"key not found in model: {re.escape(arch)}\.(\S+)", text)
        wrong = re.search(rf"key {re.escape(arch)}\.(\S+) has wrong type (\w+) but expected type (\w+)", text)
        if missing:
            keys[missing.group(1)] = _guess(missing.group(1), keys)
        elif wrong:
            keys[wrong.group(1)] = {"f32": 1.0, "bool": True, "str": "silu", "arr": [1] * 8}.get(wrong.group(3), 2)
        else:
            break
    found: dict[str, Any] = dict(_LINE.findall(text))
    found["sliding"] = [bool(int(flag)) for _, flag in _LAYER.findall(text)]
    found["keys"] = keys
    if "rope type" not in found:
        found["error"] = text[-400:]
    return found


def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for arch, keys in json.load(sys.stdin):
            print(json.dumps(_complete(Path(folder) / "header.gguf", arch, keys)), flush=True)


if __name__ == "__main__":
    _main()
