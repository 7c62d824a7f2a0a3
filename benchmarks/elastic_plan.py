"""What benchmarks.elastic runs, as chains: the runs of one chain share what was read, and go in order."""

from __future__ import annotations

from benchmarks import elastic_drift

STEP = "1.189207"  # 2 ** (1/4)
CANDIDATE = f"elastic,method=uni,step={STEP},room=1.33,t=1"
PRO = f"elastic,method=pro,step={STEP},room=1.33,t=1"
DEFAULT = CANDIDATE  # what the engine does; chosen by the ablation
STATIC = ("static,method=uni,scale=4", "static,method=pro,scale=4", "static,method=yarn,scale=4")
OTHERS = ("static,method=yarn-turns,scale=4", "static,method=ntk,scale=4", "static,method=linear,scale=4")
TEXTS = ("britannica", "voyage-out", "swanns-way")

ABLATION = (
    CANDIDATE,
    *(f"elastic,method=uni,step={STEP},room={room},t=1" for room in ("1", "1.6", "2")),
    "elastic,method=uni,step=2,room=1,t=1",
    "elastic,method=uni,step=1.414214,room=1.33,t=1",
    "elastic,method=uni,step=+1024,room=1.33,t=1",
    *(f"elastic,method={method},step={STEP},room=1.33,t=1" for method in ("pro", "yarn")),
    *(f"elastic,method=uni,step={STEP},room=1.33,t={t}" for t in ("0.5", "0")),
)
# the scale that the candidate ends with, from the first token on: a long first prompt, read either way
AT_ONCE = {16384: "static,method=uni,scale=2.66", 12288: "static,method=uni,scale=2.2368"}

FAR = range(45056, 65537, 4096)  # Gemma past 40K

Chain = list[str]


def perplexity(model: str, text: str, way: str, window: int, end: int) -> Chain:
    """Buckets to `end`; within the window elastic is `none`, and truncation takes nothing away."""
    first = window if way.startswith("elastic") or way == "truncate" else 0
    return [f"ppl/{model}/{text}/{way}/{at}" for at in range(first + 4096, end + 1, 4096)]


def needle(model: str, hay: str, seed: int, tokens: int, way: str) -> Chain:
    return [f"needle/{model}/{hay}/{seed}/{tokens}/{way}"]


def ablation() -> list[Chain]:
    """When to grow and by how much: one text to 16K, one haystack of 12K, the long first prompt, the drift."""
    ways = (*ABLATION, STATIC[0])
    return [
        perplexity("smollm2", "britannica", "none", 8192, 8192),
        *(perplexity("smollm2", "britannica", way, 8192, 16384) for way in (*ways, AT_ONCE[16384])),
        *(needle("smollm2", "noise", 42, 12288, way) for way in (*ways, AT_ONCE[12288])),
        *(needle("smollm2", "noise", 42, 16384, way) for way in (CANDIDATE, ABLATION[1], STATIC[0])),
        elastic_drift.runs(),
    ]


def final() -> list[Chain]:
    """The default against every static table and truncation: three texts to 32K, haystacks of 12K, 24K and 6K."""
    ways = ("none", DEFAULT, STATIC[0], "truncate", *STATIC[1:], *OTHERS[1:])
    ends = {"none": 16384, OTHERS[2]: 16384}  # of no use past it: read that far alone
    chains = [perplexity("smollm2", text, way, 8192, ends.get(way, 32768)) for way in ways for text in TEXTS]
    chains.append(perplexity("smollm2", TEXTS[0], OTHERS[0], 8192, 16384))
    for tokens in (12288, 24576, 6144):
        for hay in ("noise", "voyage-out"):
            inside = tokens <= 8192
            chains += [
                needle("smollm2", hay, 42, tokens, way) for way in (("none",) if inside else (DEFAULT,)) + STATIC
            ]
    return [*chains, needle("smollm2", "noise", 42, 12288, OTHERS[1])]


def gemma() -> list[Chain]:
    """The same past 32K, on a model whose every sixth layer alone is global: three texts to 40K, one of them to 64K."""
    ways = ("none", DEFAULT, PRO, *STATIC, OTHERS[1], "truncate")
    ends = dict.fromkeys(ways, (36864, 40960)) | {PRO: (36864,)}
    chains = [
        [f"ppl/gemma3/{text}/{way}/{end}" for end in ends[way]]  # the window is `none`
        for way in ways
        for text in (TEXTS[:1] if way == PRO else TEXTS)
    ]
    chains += [[f"ppl/gemma3/{TEXTS[1]}/{way}/{at}" for at in FAR] for way in (DEFAULT, *STATIC, OTHERS[1])]
    chains.append([f"ppl/gemma3/{TEXTS[1]}/truncate/{at}" for at in (49152, 65536)])
    chains.append(needle("gemma3", "noise", 42, 8192, "none"))
    return chains + [needle("gemma3", "noise", 42, 40960, way) for way in ("none", DEFAULT, *STATIC)]


GROUPS = {"ablation": ablation, "final": final, "gemma": gemma}
