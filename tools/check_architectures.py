"""Compare architectures.py with a llama.cpp source tree: python -m tools.check_architectures TREE.

Reads the sources as text: which models create rope_freqs or long/short tensors, which graphs hand factors to
RoPE, the switch of llama_model_rope_type, who has no cache, who has sliding-window layers. Prints each
difference and exits with 1 if there is any. It is a check of what text can show, not of every flag.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from mrrope_gguf.architectures import Arch, architectures

# These take one of two types by metadata; the table holds the plain one.
BY_METADATA = {"bailingmoe3": "norm", "glm4": "norm", "glm4moe": "neox", "hunyuan_vl": "neox", "dflash": "neox"}
# The switch gives these a type, but their graphs never rotate.
NO_ROPE_CALLS = {"bert", "starcoder"}


@dataclass
class Sources:
    """What the text of one model's own sources and of the graph it uses says."""

    creates_freqs: bool
    creates_long: bool
    uses_factors: bool
    rotates: bool
    slides: bool


def enum_names(tree: Path) -> dict[str, str]:
    """LLM_ARCH_X -> the name in general.architecture."""
    text = (tree / "src/llama-arch.cpp").read_text()
    names = dict(re.findall(r'\{ (LLM_ARCH_\w+),\s*"([^"]+)"', text))
    names.pop("LLM_ARCH_UNKNOWN")
    return names


def rope_types(tree: Path, names: dict[str, str]) -> dict[str, str]:
    """Architecture -> norm, neox, mrope, imrope or none, by the switch of llama_model_rope_type."""
    text = (tree / "src/llama-model.cpp").read_text()
    body = text[text.index("llama_rope_type llama_model_rope_type(") :]
    types: dict[str, str] = {}
    waiting: list[str] = []
    for case, result in re.findall(r"case (LLM_ARCH_\w+):|return ([^;]+);", body[: body.index("\n}\n")]):
        if case:
            waiting.append(names.get(case, case))
            continue
        kind = result.replace("LLAMA_ROPE_TYPE_", "").lower()
        types.update((name, BY_METADATA.get(name, kind)) for name in waiting)
        waiting = []
    return types


def uncached(tree: Path, names: dict[str, str]) -> set[str]:
    """Architectures for which create_memory makes no cache."""
    text = (tree / "src/llama-model.cpp").read_text()
    body = text[text.index("llama_memory_i * llama_model::create_memory") :]
    cases = re.findall(r"case (LLM_ARCH_\w+):", body[: body.index("res = nullptr;")])
    return {names[case] for case in cases}


def model_files(tree: Path, names: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Architecture -> text of its loader and text of the graph it builds (another model's, for some)."""
    switch = (tree / "src/llama-model.cpp").read_text()
    header = (tree / "src/models/models.h").read_text()
    texts = [path.read_text() for path in sorted((tree / "src/models").glob("*.cpp"))]
    parents = dict(re.findall(r"struct (llama_model_\w+) : public (llama_model_\w+)", header))

    def text_with(name: str, method: str) -> str:
        """The source that defines `method` of this class or of the nearest parent that has it."""
        found = [text for text in texts if f"{name}::{method}(" in text]
        return found[0] if found else text_with(parents[name], method)

    files = {}
    for case, name in re.findall(r"case (LLM_ARCH_\w+):\s*return new (llama_model_\w+)\(", switch):
        body = header[header.index(f"struct {name} :") :]
        alias = re.search(r"using graph = (llama_model_\w+)::graph", body[: body.index("\n};")])
        graph = text_with(alias.group(1) if alias else name, "build_arch_graph")
        files[names[case]] = (text_with(name, "load_arch_tensors"), graph)
    return files


def read_sources(loader: str, graph: str) -> Sources:
    """The five facts a text search can tell about a model."""
    calls = re.findall(r"ggml_rope_(?:ext|multi)\s*\(\s*ctx0,\s*[^,]+,\s*[^,]+,\s*([^,]+),", graph)
    return Sources(
        creates_freqs="LLM_TENSOR_ROPE_FREQS" in loader,
        creates_long="LLM_TENSOR_ROPE_FACTORS_LONG" in loader,
        uses_factors=any(argument.strip() not in ("nullptr", "NULL") for argument in calls),
        rotates="ggml_rope" in graph,
        slides=re.search(r"swa_type\s*= LLAMA_SWA_TYPE_(?!NONE)", loader) is not None,
    )


def differences(arch: Arch, said: Sources, rope: str, cached: bool) -> list[str]:
    """What the table and the sources disagree about, one line each."""
    expected_rope = "none" if arch.name in NO_ROPE_CALLS else rope
    group = {
        "A": said.creates_freqs and said.uses_factors,
        "B": said.creates_long and not said.creates_freqs and said.uses_factors,
        "C": said.creates_freqs and not said.uses_factors and said.rotates,
        "D": said.uses_factors and not said.creates_freqs and not said.creates_long,
    }.get(arch.group, not said.uses_factors)
    claims = {
        f"rope type is {expected_rope}": arch.rope == expected_rope,
        f"group {arch.group} does not fit {said}": group,
        f"rope_freqs created and used: {said.creates_freqs and said.uses_factors}": arch.portable
        == (said.creates_freqs and said.uses_factors),
        f"long factors used: {said.creates_long and said.uses_factors}": arch.longrope
        == (said.creates_long and said.uses_factors),
        f"sliding-window layers: {said.slides}": bool(arch.swa) == said.slides,
        f"cached: {cached}": arch.cached == cached or arch.rope == "none",
    }
    return [f"{arch.name}: {claim}" for claim, holds in claims.items() if not holds]


def check(tree: Path) -> list[str]:
    """Every difference between the table and the tree."""
    names = enum_names(tree)
    table = architectures()
    known = set(names.values())
    found = [f"{name}: missing from the table" for name in sorted(known - set(table))]
    found += [f"{name}: not in the tree" for name in sorted(set(table) - known)]
    ropes = rope_types(tree, names)
    no_cache = uncached(tree, names)
    for name, (loader, graph) in model_files(tree, names).items():
        if name in table:
            found += differences(table[name], read_sources(loader, graph), ropes[name], name not in no_cache)
    return found


def main() -> int:
    """Print the differences; 1 if there are any."""
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or f"{len(architectures())} architectures agree with {sys.argv[1]}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
