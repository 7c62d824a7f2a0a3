"""Numbers in a header that llama.cpp's loader ends the whole process for, and sizes no model has.

Everything that loops over a number from a file does so after it was checked against these.
"""

from __future__ import annotations

from math import isfinite

from .header import Header

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_CTX = 2**31 - 1  # llama.cpp counts positions in int32
MAX_ROT = 8192  # rotated dimensions of a head; no model has more than 576
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.group_norm_epsilon")


def broken(header: Header, n_layer: int) -> tuple[str, str] | None:
    """The first key whose value llama.cpp asserts against, and what it asserts; None for a header that passes.

    Follows llama_model_base::load_hparams and GGML_ASSERT(eps >= 0) of the norms.
    """
    experts = header.u32("expert_count", 0)
    used = max(header.u32s("expert_used_count", n_layer, 0))
    groups, used_groups = header.u32("expert_group_count", 0), header.u32("expert_group_used_count", 0)
    if header.u32("nextn_predict_layers", 0) > n_layer:
        return "nextn_predict_layers", f"at most the {n_layer} layers there are"
    if experts > MAX_EXPERTS:
        return "expert_count", f"at most {MAX_EXPERTS} experts"
    if not (experts == used == 0 or 0 < used <= experts) and not header.arch.startswith("hunyuan"):
        return "expert_used_count", f"between 1 and {experts} experts" if experts else "no expert, as there is none"
    if groups and (groups >= experts or experts % groups):
        return "expert_group_count", f"groups that divide {experts} experts evenly"
    if groups > 1 and not 0 < used_groups < groups:
        return "expert_group_used_count", f"fewer than the {groups} groups, and one at least"
    for name in _EPSILONS:
        value = header.f32(name, 0.0)
        if not (isfinite(value) and value >= 0.0):
            return name, "a number, 0 or above"
    return None
