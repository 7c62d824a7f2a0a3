"""What llama.cpp keeps for every token of the context, in bytes, from a GGUF header alone.

Follows llama_model::create_memory and the caches it makes (llama-kv-cache*.cpp, llama-memory-*.cpp): each `Cache` here
is one "llama_kv_cache: size = ..." line of its log, with the same cells, layers and bytes. A test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mrrope_gguf.errors import Refused
from mrrope_gguf.gguf.index import GGUFIndex
from mrrope_gguf.gguf.types import ggml_type, padded
from mrrope_gguf.header import Header
from mrrope_gguf.kinds import known_architecture
from mrrope_gguf.layers import count_layers, layers, window

PAD = 256
F32 = 4

# the model is an encoder or a diffusion model: every batch is complete in itself
_NO_CACHE = frozenset(
    (
        "bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "eurobert",
        "wavtokenizer-dec",
        "modern-bert",
        "gemma-embedding",
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
    )
)
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
_HYBRID_BY_HEADS = frozenset(
    (
        "jamba",
        "plamo2",
        "granitehybrid",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "kimi-linear",
        "kimi-k3",
        "bailingmoe3",
        "glm5-next",
    )
)
_HYBRID_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
_TRUNK_ONLY = frozenset((*_HYBRID_INTERVAL, "glm5-next", "deepseek32", "glm-dsa", "dots3note"))
_KDA = frozenset(("kimi-linear", "kimi-k3", "bailingmoe3", "glm5-next"))
_GROUPED_SSM = frozenset(
    (
        "mamba2",
        "falcon-h1",
        "nemotron_h",
        "nemotron_h_moe",
        "granitehybrid",
        "plamo2",
        "qwen3next",
        "qwen35",
        "qwen35moe",
        "qwen4exp",
    )
)
# glm-dsa without indexer types in the file: from a million tokens on, only these layers own an indexer
_GLM_MILLION = 1048576
_CSA, _HCA = 4, 128


@dataclass(frozen=True)
class Setting:
    """The context parameters that decide sizes, by llama.cpp's names; types are ggml type names."""

    n_ctx: int
    type_k: str = "f16"
    type_v: str = "f16"
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq_max: int = 1
    flash_attn: bool = True
    swa_full: bool = False
    kv_unified: bool = False

    @property
    def cells(self) -> int:
        """Cells of one stream of the main cache (n_ctx_seq): n_ctx padded to 256, shared out among sequences."""
        n_ctx = padded(self.n_ctx, PAD)
        return n_ctx if self.kv_unified else padded(n_ctx // self.n_seq_max, PAD)

    @property
    def streams(self) -> int:
        return 1 if self.kv_unified else self.n_seq_max

    @property
    def ubatch(self) -> int:
        return min(self.n_ctx, self.n_batch, self.n_ubatch)


@dataclass(frozen=True)
class Cache:
    """One cache: `cells` per stream, its layers, bytes of keys and of values (of a recurrent one: its r and s)."""

    name: str
    cells: int
    n_layer: int
    k: int
    v: int

    @property
    def nbytes(self) -> int:
        return self.k + self.v


@dataclass(frozen=True)
class _Indexer:
    """The key cache of a sparse-attention indexer: in which layers, and how many elements a token takes."""

    layers: tuple[int, ...]
    k: int
    v: int = 0


@dataclass(frozen=True)
class Memory:
    """What each layer remembers. `k`, `v`: elements per token, by layer; `attention`: layers with keys in the cache."""

    k: tuple[int, ...]
    v: tuple[int, ...]
    attention: tuple[int, ...]
    sliding: frozenset[int] = frozenset()
    window: int = 0
    keys_only: bool = False
    head_sizes: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    n_recurrent: int = 0
    state: tuple[int, int] = (0, 0)
    indexer: _Indexer | None = None
    ratios: tuple[int, ...] = ()
    flash_attn: bool = True

    def caches(self, setting: Setting) -> list[Cache]:
        """Every cache llama.cpp would allocate for these context parameters, in the order of its log.

        Raises Refused for cache types that llama.cpp refuses for this model.
        """
        setting = replace(setting, flash_attn=setting.flash_attn and self.flash_attn)
        self._check_types(setting)
        if self.ratios:
            # a stream for every sequence, even in a unified cache
            return self._compressed(replace(setting, kv_unified=False, n_ctx=setting.cells * setting.n_seq_max))
        found = self._attention(setting)
        if self.indexer:
            found.insert(1, self._indexed(setting, self.indexer))
        if self.n_recurrent:
            r, s = (F32 * elements * setting.n_seq_max for elements in self.state)
            found.append(Cache("recurrent", setting.n_seq_max, self.n_recurrent, r, s))
        return found

    def _check_types(self, setting: Setting) -> None:
        """Refuse what llama_init_from_model refuses, and what would abort the process later."""
        if not self.attention:
            return
        for name, sizes in zip((setting.type_k, setting.type_v), self.head_sizes, strict=True):
            block = ggml_type(name).block_size
            bad = [size for size in sizes if size % block]
            if bad:
                raise Refused(
                    f"this model cannot have a {name} cache",
                    why=f"its heads are {bad[0]} wide, and {name} stores blocks of {block} values",
                    fix="use f16 for the cache (-ctk f16 -ctv f16)",
                )
        if self.keys_only and setting.type_k != setting.type_v:
            raise Refused(
                "this model keeps keys and values in one cache, of one type",
                why=f"{setting.type_k} was asked for keys and {setting.type_v} for values",
                fix="give both the same type",
            )
        if ggml_type(setting.type_v).block_size > 1 and not setting.flash_attn:
            raise Refused(
                f"a {setting.type_v} cache for values needs flash attention",
                why="without it values lie transposed, and a quantised row cannot be written one token at a time",
                fix="turn flash attention on, or use f16 for values (-ctv f16)",
            )

    def _attention(self, setting: Setting) -> list[Cache]:
        full = tuple(i for i in self.attention if i not in self.sliding)
        if not self.sliding:
            return [self._cache("kv", full, setting.cells, setting)] if self.attention else []
        slides = tuple(i for i in self.attention if i in self.sliding)
        return [
            self._cache("global", full, setting.cells, setting),
            self._cache("sliding", slides, self._sliding_cells(setting), setting),
        ]

    def _sliding_cells(self, setting: Setting) -> int:
        sequences = setting.n_seq_max if setting.kv_unified else 1
        if setting.swa_full:
            return setting.cells
        return padded(min(setting.cells, self.window * sequences + setting.ubatch), PAD)

    def _cache(self, name: str, which: tuple[int, ...], cells: int, setting: Setting) -> Cache:
        # without flash attention V lies transposed, and every layer is as wide as the widest
        widest = 0 if setting.flash_attn else max(self.v, default=0)
        k = sum(row_bytes(setting.type_k, self.k[i]) for i in which)
        v = 0 if self.keys_only else sum(row_bytes(setting.type_v, widest or self.v[i]) for i in which)
        return Cache(name, cells, len(which), k * cells * setting.streams, v * cells * setting.streams)

    def _indexed(self, setting: Setting, indexer: _Indexer) -> Cache:
        rows = len(indexer.layers) * setting.cells * setting.streams
        k, v = row_bytes(setting.type_k, indexer.k), row_bytes(setting.type_v, indexer.v)
        return Cache("indexer", setting.cells, len(indexer.layers), k * rows, v * rows)

    def _compressed(self, setting: Setting) -> list[Cache]:
        """DeepSeek V4: a sliding cache of raw keys in every layer, and compressed ones, 4 or 128 tokens to a cell."""
        assert self.indexer is not None  # deepseek4 has one
        found, state = self._attention(setting), 0
        for name, ratio, width in (("csa", _CSA, 0), ("hca", _HCA, 0), ("indexer", _CSA, self.indexer.k)):
            which = [i for i in self.attention if self.ratios[i] == ratio]
            cells = padded(max(1, -(-setting.cells // ratio)), PAD)
            k = sum(row_bytes(setting.type_k, width or self.k[i]) for i in which)
            found.append(Cache(name, cells, len(which), k * cells * setting.streams, 0))
            # one window under way, or two overlapping ones of twice the width
            rows = 4 * ratio if ratio == _CSA else ratio
            state += F32 * rows * sum(width or self.k[i] for i in which) * setting.streams
        return [*found, Cache("compressor", setting.streams, len(self.attention), state, state)]


def row_bytes(type_name: str, width: int) -> int:
    """Bytes of `width` elements of a ggml type, a whole number of blocks."""
    kind = ggml_type(type_name)
    return width // kind.block_size * kind.type_size


def memory(index: GGUFIndex) -> Memory:
    """What each layer of this model keeps. Refused for a GGUF that is no model, or of an unknown architecture."""
    arch = known_architecture(index)
    header = Header(index, arch.name)
    trunk = count_layers(header)
    n_all = trunk + header.u32("nextn_predict_layers", 0) + (arch.name == "graniteswitch")
    recurrent = _recurrent(header, trunk)
    attention = _attention_layers(header, trunk, n_all, recurrent)
    sliding = frozenset(i for i, slides in enumerate(layers(header, arch).sliding) if slides and i in attention)
    heads, k, v = _widths(header, n_all, sliding)
    r, s = _state(header)
    return Memory(
        k=k,
        v=v,
        attention=attention,
        sliding=sliding,
        window=window(header),
        keys_only=bool(header.u32("attention.key_length_mla", 0) or arch.name == "deepseek4"),
        head_sizes=heads,
        n_recurrent=len(recurrent),
        state=(r * len(recurrent) + _hash_state(header), s * len(recurrent)),
        indexer=_indexer(header, trunk, attention, sliding, v),
        ratios=header.array("attention.compress_ratios", n_all) or () if arch.name == "deepseek4" else (),
        flash_attn=arch.name != "grok",
    )


def _heads(header: Header, n_all: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heads and key-value heads of every layer; a repeated pass through the layers has those of the first."""
    blocks = min(header.u32("block_count", 0), n_all) or n_all
    heads = header.u32s("attention.head_count", blocks, 0)
    kv = header.u32s("attention.head_count_kv", blocks, 0) if header.has("attention.head_count_kv") else heads
    if header.arch == "graniteswitch":
        return (*heads[: n_all - 1], 1), (*kv[: n_all - 1], 1)
    passes = -(-n_all // blocks)
    return (heads * passes)[:n_all], (kv * passes)[:n_all]


def _widths(
    header: Header, n_all: int, sliding: frozenset[int]
) -> tuple[tuple[frozenset[int], frozenset[int]], tuple[int, ...], tuple[int, ...]]:
    """The head sizes of keys and values, and the elements of a token's keys and values by layer."""
    heads, kv = _heads(header, n_all)
    first = heads[0] if heads else 0
    per_head = header.u32("embedding_length", 0) // first if first else 0
    sizes = []
    for what in ("key", "value"):
        full = header.u32(f"attention.{what}_length", per_head) if first or header.arch == "plamo2" else 0
        slides = header.u32(f"attention.{what}_length_swa", full)
        sizes.append([slides if i in sliding else full for i in range(n_all)])
    k, v = (tuple(n * size for n, size in zip(kv, by_layer, strict=True)) for by_layer in sizes)
    return (frozenset(sizes[0]), frozenset(sizes[1])), k, v


def _recurrent(header: Header, trunk: int) -> frozenset[int]:
    """The layers that carry a state from token to token."""
    name = header.arch
    if name in _RECURRENT or name == "falcon-h1":
        return frozenset(range(trunk))
    if name in _HYBRID_INTERVAL:
        marked = header.array("attention.recurrent_layers", trunk)
        interval = max(header.u32("full_attention_interval", _HYBRID_INTERVAL[name]), 1)
        return frozenset(i for i in range(trunk) if (marked[i] if marked else (i + 1) % interval))
    if name not in _HYBRID_BY_HEADS:
        return frozenset()
    kv = _heads(header, trunk)[1]
    ff = header.u32s("feed_forward_length", trunk, 0) if name.startswith("nemotron") else (0,) * trunk
    return frozenset(i for i in range(trunk) if kv[i] == 0 and ff[i] == 0)


def _attention_layers(header: Header, trunk: int, n_all: int, recurrent: frozenset[int]) -> tuple[int, ...]:
    """The layers that have keys of their own in the cache."""
    name = header.arch
    if name in _NO_CACHE or name in _RECURRENT:
        return ()
    if name == "falcon-h1":
        return tuple(range(n_all))
    if name.startswith("nemotron_h"):
        ff = header.u32s("feed_forward_length", n_all, 0)
        return tuple(i for i in range(n_all) if i not in recurrent and ff[i] == 0)
    own = {"gemma3n": 20, "gemma4": n_all - header.u32("attention.shared_kv_layers", 0)}.get(name, n_all)
    drafts_too = name in ("minimax-m3", "hy_v4", "graniteswitch", "deepseek4") or name in _HYBRID_BY_HEADS - _TRUNK_ONLY
    count = n_all if drafts_too or trunk == 0 else trunk
    return tuple(i for i in range(min(count, own)) if i not in recurrent)


def _state(header: Header) -> tuple[int, int]:
    """Elements of one recurrent layer's two states: the convolution's window and the state proper."""
    name, u32 = header.arch, header.u32
    n_embd, conv = u32("embedding_length", 0), u32("ssm.conv_kernel", 0)
    if "rwkv" in name:
        return u32("token_shift_count", 2) * n_embd, n_embd * u32("wkv.head_size", 0)
    if name.startswith("lfm2"):
        return n_embd * (u32("shortconv.l_cache", 1) - 1), 0
    n_head = header.u32s("attention.head_count", 1, 0)[0]
    if name in _KDA:
        size = u32("kda.head_dim", 0)
        return 3 * (conv - 1 if conv else 3) * n_head * size, size * size * n_head
    if name == "minimax-01":
        return 0, u32("attention.key_length", n_embd // max(n_head, 1)) ** 2 * n_head
    inner, size = u32("ssm.inner_size", 0), u32("ssm.state_size", 0)
    groups = u32("ssm.group_count", 0) if name in _GROUPED_SSM else 0
    return max(conv - 1, 0) * (inner + 2 * groups * size), size * inner


def _hash_state(header: Header) -> int:
    """qwen4exp's one layer with hashed n-grams keeps the window of a dilated convolution besides."""
    if header.arch != "qwen4exp" or not header.has("ple.layers"):
        return 0
    taps = max(header.u32("ple.conv_kernel", 0) - 1, 0) * header.u32("ple.ngram_size", 0)
    return taps * header.u32("hyper_connection.count", 0) * header.u32("embedding_length", 0)


def _indexer(
    header: Header, trunk: int, attention: tuple[int, ...], sliding: frozenset[int], v: tuple[int, ...]
) -> _Indexer | None:
    """The sparse-attention architectures keep one more key per token, to choose by which tokens are attended to."""
    name, width = header.arch, header.u32("attention.indexer.key_length", 0)
    if name == "minimax-m3":
        lead = header.u32("leading_dense_block_count", 0)
        heads_v = header.u32("attention.value_length", v[0] // max(_heads(header, 1)[1][0], 1))
        return _Indexer(tuple(i for i in attention if i >= lead), width, heads_v)
    if name == "qwen4exp":
        return _Indexer(attention, width) if width else None
    if name in ("deepseek32", "deepseek4"):
        return _Indexer(attention, width)
    if name not in ("glm-dsa", "dots3note", "hy_v4", "glm5-next"):
        return None
    if name == "hy_v4" and not header.u32("attention.indexer.top_k", 0):
        return None
    owners = _indexer_owners(header, trunk)
    pooled = 3 if name == "glm5-next" and header.u32("attention.indexer.kpool", 0) else 1
    mine = tuple(i for i in attention if i < trunk and owners[i] and i not in sliding)
    return _Indexer(mine, width * pooled)


def _indexer_owners(header: Header, trunk: int) -> tuple[int, ...]:
    """1 for the layers with an indexer of their own; the others look at what the last one found."""
    listed = header.array("attention.indexer.types", trunk)
    if listed is not None:
        return listed
    if header.arch == "glm-dsa" and header.u32("context_length", 0) >= _GLM_MILLION:
        return tuple(int(i < 2 or i % 4 == 2) for i in range(trunk))
    return (1,) * trunk
