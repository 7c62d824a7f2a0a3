"""Which layers attend, which of them slide, and which rotate: what llama.cpp makes of an architecture's metadata.

The context of a model grows in its *global* RoPE layers: those that attend to everything and rotate. Layers with
a sliding window never see farther than they were trained to and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architectures import Arch
from .header import Header


@dataclass(frozen=True)
class Layers:
    """One bool per executed layer (layers of next-token drafts at the end of a file are not counted)."""

    attention: tuple[bool, ...]
    sliding: tuple[bool, ...]
    rope: tuple[bool, ...]

    @property
    def extended(self) -> tuple[int, ...]:
        """The layers a rope table is for: attention, global, with RoPE."""
        rows = enumerate(zip(self.attention, self.sliding, self.rope, strict=True))
        return tuple(i for i, (attends, slides, rotates) in rows if attends and rotates and not slides)


@dataclass(frozen=True)
class _Pattern:
    """How an architecture lays out its sliding layers when the file holds no array: one full layer per period."""

    period: int
    dense_first: bool = False
    always: bool = False

    def layout(self, n_layer: int) -> tuple[bool, ...]:
        full = 0 if self.dense_first else self.period - 1
        return tuple(self.period == 0 or i % self.period != full for i in range(n_layer))


# period 0: every layer slides; `always`: also without attention.sliding_window in the file
_PATTERNS = {
    "afmoe": _Pattern(4),
    "cohere2": _Pattern(4, always=True),
    "cohere2moe": _Pattern(4, dense_first=True, always=True),
    "deepseek4": _Pattern(0, always=True),
    "exaone-moe": _Pattern(4, always=True),
    "gemma-embedding": _Pattern(6, always=True),
    "gemma2": _Pattern(2, always=True),
    "gemma3": _Pattern(6),
    "gemma3n": _Pattern(5, always=True),
    "gpt-oss": _Pattern(2, always=True),
    "laguna": _Pattern(4, dense_first=True),
    "mellum": _Pattern(4),
    "modern-bert": _Pattern(3, dense_first=True),
    "muse-glimmer": _Pattern(4, always=True),
    "olmo2": _Pattern(4),
    "plamo3": _Pattern(8),
    "smallthinker": _Pattern(4, dense_first=True),
}
# the pattern comes from the file alone: attention.sliding_window_pattern must be an array
_ARRAY_ONLY = frozenset(
    ("dflash", "dots3note", "gemma4", "gemma4-assistant", "granite_swa", "maple", "mimo2", "spark2_5", "step35")
)
_HYBRID_BY_HEADS = frozenset(("bailingmoe3", "granitehybrid", "lfm2", "lfm2moe", "plamo2"))
_HYBRID_INTERVAL = {"minimax-01": 8, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}
_ROPE_SWITCH = frozenset(("granite", "granitehybrid", "graniteswitch"))
_DEFAULT_WINDOW = {"gemma2": 4096, "exaone-moe": 128}
_EXAONE4_SLIDING = 64
_BAICHUAN_ROPE = 32  # the 7B model; its graph rotates for no other number of layers
_LLAMA4_CHUNK = 8192


def count_layers(header: Header) -> int:
    """Executed layers: block_count without the next-token draft layers; nanbeige passes through them several times."""
    n_layer = header.u32("block_count", 0) - header.u32("nextn_predict_layers", 0)
    return n_layer * header.u32("num_loops", 1) if header.arch == "nanbeige" else n_layer


def window(header: Header) -> int:
    """The sliding window in tokens, 0 where no layer slides: attention.sliding_window with the loader's defaults."""
    name, n_swa = header.arch, header.u32("attention.sliding_window", _DEFAULT_WINDOW.get(header.arch, 0))
    if name == "llama4":
        # a window of 0 in the file switches chunks off; anything else, even no key, means chunks of 8192
        return 0 if header.has("attention.sliding_window") and n_swa == 0 else _LLAMA4_CHUNK
    if name == "exaone4":
        if header.u32("block_count", 0) - header.u32("nextn_predict_layers", 0) != _EXAONE4_SLIDING:
            return 0
        return header.u32("attention.sliding_window", 4096)
    if name == "smallthinker" and n_swa:
        return 4096
    slides = name in _PATTERNS or name in _ARRAY_ONLY or name == "lfm2"
    return n_swa if slides else 0


def layers(header: Header, arch: Arch) -> Layers:
    """The layers of a model of this architecture, as llama.cpp's loader and graph treat them."""
    n_layer = count_layers(header)
    attention = _attention(header, n_layer)
    sliding = _sliding(header, n_layer, attention)
    return Layers(attention, sliding, _rope(header, arch, n_layer, sliding))


def _attention(header: Header, n_layer: int) -> tuple[bool, ...]:
    """False for layers of a hybrid model that keep a recurrent state instead of keys."""
    name = header.arch
    if name in _HYBRID_BY_HEADS:
        return tuple(n > 0 for n in header.u32s("attention.head_count_kv", n_layer, 1))
    if name in _HYBRID_INTERVAL:
        marked = header.array("attention.recurrent_layers", n_layer)
        if marked is not None:
            return tuple(not recurrent for recurrent in marked)
        interval = max(header.u32("full_attention_interval", _HYBRID_INTERVAL[name]), 1)
        return tuple((i + 1) % interval == 0 for i in range(n_layer))
    return (True,) * n_layer


def _sliding(header: Header, n_layer: int, attention: tuple[bool, ...]) -> tuple[bool, ...]:
    """True for layers with a sliding window, or with llama4's chunks."""
    name = header.arch
    pattern = _Pattern(4) if name in ("llama4", "exaone4") else _PATTERNS.get(name)
    if not window(header) and not (pattern and pattern.always):
        return (False,) * n_layer
    if name == "lfm2":
        return attention
    listed = header.array("attention.sliding_window_pattern", n_layer)
    if listed is not None and name != "deepseek4":
        return tuple(map(bool, listed))
    if pattern is None:
        return (False,) * n_layer
    period = header.u32("attention.sliding_window_pattern", pattern.period) if pattern.period else 0
    return _Pattern(period, pattern.dense_first).layout(n_layer)


def _rope(header: Header, arch: Arch, n_layer: int, sliding: tuple[bool, ...]) -> tuple[bool, ...]:
    """True for the layers whose queries and keys are rotated."""
    name = arch.name
    if arch.rope == "none" or (name in _ROPE_SWITCH and not header.flag("rope.scaling.finetuned", True)):
        return (False,) * n_layer
    if name == "baichuan" and n_layer != _BAICHUAN_ROPE:
        return (False,) * n_layer
    if name == "granite_swa":
        return tuple(map(bool, header.array("attention.rope_pattern", n_layer) or (1,) * n_layer))
    if name in ("smollm3", "afmoe", "llama4"):
        # llama4 without chunks means "always", but writes it as a step of n_layer, so the last layer has none
        step = n_layer if name == "llama4" and not any(sliding) else 4
        return tuple((i + 1) % step != 0 for i in range(n_layer))
    if name == "smallthinker":
        return tuple(not any(sliding) or i % 4 != 0 for i in range(n_layer))
    if name == "cohere2moe":
        lead = header.u32("leading_dense_block_count", 0)
        return tuple(slides or i < lead for i, slides in enumerate(sliding))
    if name in ("cohere2", "exaone-moe", "muse-glimmer", "maple") or (name == "exaone4" and any(sliding)):
        return sliding
    return (True,) * n_layer
