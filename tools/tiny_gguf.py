"""Writes the tiny retriever as a GGUF file of architecture llama, which stock llama.cpp loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tools import tiny_data

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from tools.tiny_model import Shape

    Floats = NDArray[np.float32]


def write(path: Path, shape: Shape, weights: Mapping[str, Floats], *, eps: float, description: str) -> Path:
    """Write weights by their GGUF names, (n_out, n_in): matrices as Q8_0, norms as F32, or no file at all."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    beside = path.with_name(path.name + ".part")
    writer = GGUFWriter(beside, "llama")
    writer.add_name(path.stem)
    writer.add_description(description)
    writer.add_license("mit")
    writer.add_author("mrrope-gguf")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.freq_base)
    writer.add_layer_norm_rms_eps(eps)
    _tokenizer(writer)
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, path)
    return path


def _tokenizer(writer: GGUFWriter) -> None:
    from gguf import TokenType

    vocabulary, n_phrases = tiny_data.vocabulary(), len(tiny_data.phrases())
    plain = [TokenType.NORMAL] * (len(vocabulary) - 2 - n_phrases)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL] * 2 + plain + [TokenType.USER_DEFINED] * n_phrases)
    writer.add_token_merges(tiny_data.merges())
    writer.add_bos_token_id(tiny_data.BOS_ID)
    writer.add_eos_token_id(tiny_data.EOS_ID)
    writer.add_add_bos_token(True)
