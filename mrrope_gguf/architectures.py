"""What stock llama.cpp does with RoPE in each of its architectures: the table everything else asks.

Read from the sources of the pinned llama.cpp (src/models/*.cpp, llama_model_rope_type, create_memory);
tools/check_architectures.py compares this table with such a tree, so run it when the pin moves.
Which layers slide or skip RoPE is decided by metadata too: see layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

GROUPS = {
    "A": "loads rope_freqs.weight and uses it: a portable file is possible",
    "B": "takes long and short factors only (rope_factors_long.weight), with any scaling type",
    "C": "loads rope_freqs.weight, but its graph ignores it",
    "D": "asks for factors, but never loads the tensor",
    "E": "plain RoPE without factors, one base, in every attention layer",
    "F": "plain RoPE without factors, with sliding-window layers",
    "G": "RoPE on a slice of each head (MLA and its kin), or with literal arguments",
    "H": "no RoPE",
}


@dataclass(frozen=True)
class Arch:
    """One architecture of llama.cpp; what only metadata can decide is decided in facts.py.

    `portable`: stock loads *and* uses rope_freqs.weight. `longrope`: it takes rope_factors_long/short,
    which outside group B needs `rope.scaling.type = longrope`, and then rope_freqs.weight is not loaded.
    `swa`: "" (none), "own-base" (sliding layers have a base of their own), "same-base", "literal" (they
    ignore every scaling), "only" (in models with a window, only sliding layers have RoPE).
    `leak`: what a portable file changes in sliding layers too: "", "attn_factor" or "factors".
    `static_only`: cached keys cannot be re-rotated, so no elastic context (a norm after RoPE, several positions for
    one key, no shift, or indexer keys that lie in their cache as no RoPE made them).
    """

    name: str
    group: str
    rope: str
    portable: bool = False
    longrope: bool = False
    swa: str = ""
    leak: str = ""
    static_only: bool = False
    hook: bool = True
    cached: bool = True
    draft: bool = False
    norm_after_rope: bool = False
    note: str = ""


# Name, RoPE type, flags; a note after #. Flags: freqs (portable), long, swa:KIND, leak:WHAT, static, nohook (the
# patched engine cannot install a table), nocache, draft, renorm (q and k are normalised after RoPE).
_TABLE = {
    "A": """
llama            norm  freqs long
llama-embed      norm  freqs long           # embedding model
mistral3         norm  freqs long           # attention temperature by position uses original_context_length
deci             norm  freqs long
granite          norm  freqs long           # no RoPE at all when rope.scaling.finetuned is false
granitemoe       norm  freqs long
granitehybrid    norm  freqs                # hybrid; no RoPE at all when rope.scaling.finetuned is false
granite_swa      norm  freqs long swa:same-base leak:factors  # attention.rope_pattern chooses the layers
minicpm          norm  freqs long
apertus          neox  freqs long
arcee            norm  freqs
nanbeige         norm  freqs
exaone           neox  freqs
exaone4          neox  freqs swa:only       # 64 layers: sliding window, RoPE there alone; otherwise every layer
exaone-moe       neox  freqs swa:only
llama4           norm  freqs swa:only static renorm  # chunked layers; a window of 0 gives RoPE to all but the last
step35           neox  freqs long swa:own-base leak:attn_factor static  # full layers rotate half the dimensions
gemma4           neox  freqs swa:own-base leak:attn_factor  # its own rope_freqs are required: multiply
gemma4-assistant neox  freqs swa:own-base leak:attn_factor draft
eagle3           norm  freqs draft
dflash           neox  freqs swa:same-base leak:factors draft  # mrope with sections, norm for DeepSeek-V4
""",
    "B": """
phi3             neox  long                 # phi-4 too; partial rotary
phimoe           neox  long
minicpm3         neox  long                 # MLA: RoPE on a slice of each head
""",
    "C": """
llada            norm  nocache              # diffusion
falcon-h1        neox                       # hybrid
pangu-embedded   neox                       # llama's function with other pairs: can be re-expressed
cogvlm           neox  nohook               # plain ggml_rope: base 10000, no factors, whatever the file says
""",
    "D": """
bailingmoe       norm                       # granitemoe's function if its expert weights are normalised: re-expressed
deepseek         norm
graniteswitch    norm                       # no RoPE at all when rope.scaling.finetuned is false
hunyuan-moe      neox  static renorm
hunyuan-dense    neox  static renorm        # rope.scaling.alpha raises the base
hunyuan_vl       neox  static renorm        # mrope with sections; rope.scaling.alpha raises the base
hy_v3            neox
cohere2          norm  swa:only
cohere2moe       norm  swa:only             # the leading dense layers have full attention and RoPE
""",
    "E": """
qwen             neox                       # exaone's function: can be re-expressed
qwen2            neox                       # llama's function with other pairs: can be re-expressed
qwen2moe         neox
qwen3            neox
qwen3moe         neox
dream            neox  nocache              # diffusion
rnd1             neox  nocache              # diffusion
grovemoe         neox
llada-moe        neox  nocache              # diffusion
seed_oss         neox
dots1            neox
starcoder2       neox
falcon           neox
codeshell        neox
orion            neox
dbrx             neox
grok             neox                       # reads the yarn_* keys
bitnet           neox
olmoe            neox
openelm          neox
plamo            neox                       # rotates the whole head whatever rope.dimension_count says
plamo2           neox                       # hybrid
gemma            neox
bailingmoe2      neox
jais2            neox
hrm_text         neox                       # layers are passed through several times, each pass with its own cache
minimax-01       neox                       # hybrid: linear attention in 7 of 8 layers
minimax-m2       neox
minimax-m3       neox                       # sparse attention: a second roped cache of indexer keys
phi2             neox                       # partial rotary
stablelm         neox                       # partial rotary
gptneox          neox                       # partial rotary
nemotron         neox                       # partial rotary
glm4moe          neox                       # partial rotary; mrope with sections
qwen3next        neox                       # hybrid, partial rotary
talkie           neox  static renorm
lfm2             neox  swa:only             # hybrid; with a sliding window every attention layer slides
lfm2moe          neox                       # hybrid
eurobert         neox  nocache              # embedding model
jina-bert-v3     neox  nocache              # embedding model
nomic-bert       neox  nocache              # embedding model
nomic-bert-moe   neox  nocache              # embedding model
internlm2        norm                       # llama's function: can be re-expressed
xverse           norm                       # llama's function: can be re-expressed
command-r        norm
olmo             norm
arctic           norm
maincoder        norm  static renorm
chameleon        norm
ernie4_5         norm                       # llama's function: can be re-expressed
ernie4_5-moe     norm
baichuan         norm                       # 32 layers (7B): can be re-expressed as llama; 40 (13B): ALiBi, no RoPE
chatglm          norm                       # partial rotary
glm4             norm                       # partial rotary; mrope with sections
smollm3          norm                       # no RoPE in every 4th layer
neo-bert         norm  nocache              # embedding model
pockettts        norm                       # speech
qwen2vl          mrope static
paddleocr        mrope static
qwen3vl          imrope static
qwen3vlmoe       imrope static
qwen35           imrope static              # hybrid
qwen35moe        imrope static              # hybrid
qwen4exp         imrope static              # hybrid, with a second roped cache of indexer keys
qwen3tts         imrope static              # speech
""",
    "F": """
gemma3           neox  swa:own-base
gemma3n          neox  swa:own-base
gemma-embedding  neox  swa:own-base nocache # embedding model
mimo2            neox  swa:own-base
modern-bert      neox  swa:own-base nocache # embedding model
plamo3           neox  swa:own-base
gemma2           neox  swa:same-base
gpt-oss          neox  swa:same-base
spark2_5         neox  swa:same-base
smallthinker     neox  swa:only             # without a window: RoPE in every layer
afmoe            neox  swa:only             # no RoPE in every 4th layer, which are the full ones
olmo2            neox  swa:literal          # olmo 3 too; olmo 2 has no sliding window
mellum           neox  swa:literal
laguna           neox  swa:literal
muse-glimmer     norm  swa:only
maple            neox  swa:only
""",
    "G": """
deepseek2        norm                       # kq_scale holds attn_factor squared
deepseek2-ocr    norm                       # plain heads, in fact NEOX pairs, with literal RoPE arguments
deepseek32       norm  static                # kq_scale holds attn_factor squared; a second roped indexer cache
deepseek4        norm  nohook static swa:own-base  # rotates values back, which a table cannot follow
glm-dsa          norm  static                # kq_scale holds attn_factor squared; 1048576 tokens change its indexers
mistral4         norm                       # kq_scale holds attn_factor squared
dots3note        norm  swa:own-base static  # a second roped indexer cache
bailingmoe3      norm                       # hybrid; mrope with sections
hy_v4            norm                       # with a second roped indexer cache, where there is one, not elastic
plm              norm
""",
    "H": """
gpt2 none
gptj none
mpt none
refact none                                 # ALiBi, though it would load rope_freqs.weight
bloom none
mamba none
mamba2 none
jamba none
jina-bert-v2 none
t5 none
t5encoder none
jais none
rwkv6 none
rwkv6qwen2 none
rwkv7 none
arwkv7 none
wavtokenizer-dec none
nemotron_h none
nemotron_h_moe none
kimi-linear none
kimi-k3 none
glm5-next none
clip none                                   # a projector for images or audio (mmproj), not a language model
bert none                                   # learned positions
starcoder none                              # learned positions
""",
}


def _row(group: str, line: str) -> Arch:
    """One line of the table as an Arch."""
    columns, _, note = line.partition("#")
    name, rope, *flags = columns.split()
    named = dict(flag.split(":") for flag in flags if ":" in flag)
    return Arch(
        name=name,
        group=group,
        rope=rope,
        portable="freqs" in flags,
        longrope="long" in flags,
        swa=named.get("swa", ""),
        leak=named.get("leak", ""),
        static_only="static" in flags or rope in ("mrope", "imrope"),
        hook="nohook" not in flags and rope != "none",
        cached="nocache" not in flags,
        draft="draft" in flags,
        norm_after_rope="renorm" in flags,
        note=note.strip(),
    )


@cache
def architectures() -> dict[str, Arch]:
    """Every architecture of the pinned llama.cpp by name, in the order of the groups."""
    rows = (_row(group, line) for group, lines in _TABLE.items() for line in lines.strip().splitlines())
    return {arch.name: arch for arch in rows}


def architecture(name: str) -> Arch | None:
    """The architecture called `name` in general.architecture, or None if llama.cpp does not know it.

    >>> architecture("llama").portable, architecture("qwen2").portable, architecture("nonsense")
    (True, False, None)
    """
    return architectures().get(name)
