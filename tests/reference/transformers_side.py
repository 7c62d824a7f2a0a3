"""Runs in .venv-reference: makes the tiny models in transformers, converts them by upstream's converter, runs them.

    python -m tests.reference.transformers_side LLAMA_CPP_SOURCE OUT

leaves OUT/<name>.gguf and OUT/<name>-one.gguf (a single layer) and OUT/transformers.npz, logits (n_tokens, n_vocab)
by "<name>/<table>/<run>". The converter is upstream's, but for the vocabulary: these models have none.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.reference import spec


def main(source: Path, out: Path) -> None:
    logits: dict[str, Any] = {}
    for name, model in spec.MODELS.items():
        for suffix, n_layer in (("", model.n_layer), ("-one", 1)):
            net = build(model, n_layer)
            folder = out / (name + suffix)
            save(net, folder)
            convert(source, folder, out / f"{name}{suffix}.gguf")
            for table_name, table in spec.tables(model).items():
                apply(net, model, table)
                for run_name, run in spec.RUNS.items():
                    logits[f"{name}{suffix}/{table_name}/{run_name}"] = forward(net, run)
    np.savez(out / "transformers.npz", **logits)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "versions.json").write_text(json.dumps(versions))


def build(model: spec.Model, n_layer: int) -> Any:
    """A model in float32 with random weights, large enough that attention matters, seeded by parameter name."""
    config_class = getattr(transformers, f"{model.hf}TextConfig", None) or getattr(transformers, f"{model.hf}Config")
    partial = model.config.get("partial_rotary_factor", 1.0)
    rope = {"rope_type": "default", "rope_theta": model.freq_base, "partial_rotary_factor": partial}
    if model.gguf == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        rope = {"full_attention": rope, "sliding_attention": local}
    extra = model.one_layer if n_layer == 1 else {}
    values = {**spec.COMMON, **model.config, **extra, "rope_parameters": rope, "num_hidden_layers": n_layer}
    config = config_class(**values, attn_implementation="eager", dtype=torch.float32)
    net = getattr(transformers, f"{model.hf}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights(name, tuple(parameter.shape), model))
    net.tie_weights()
    return net


def weights(name: str, shape: tuple[int, ...], model: spec.Model) -> Any:
    """Matrices keep the size of what they act on; scores of attention have a deviation near 3."""
    noise = torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)).float()
    if name.endswith("bias"):
        return 0.5 * noise
    if len(shape) == 1:
        sharp = 1.7 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        return sharp + 0.2 * noise - (1.0 if model.gguf == "gemma3" else 0.0)  # Gemma's norms add the 1 themselves
    if "embed_tokens" in name:
        return noise / (8.0 if model.gguf == "gemma3" else 1.0)  # Gemma multiplies embeddings by sqrt(hidden_size)
    gain = 1.7 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "q_b_proj", "kv_b_proj")) else 2.0
    return noise * (gain / shape[-1] ** 0.5)


def save(net: Any, folder: Path) -> None:
    net.save_pretrained(folder)
    # the converter of Gemma 3 counts the vocabulary here
    vocab = {f"t{i}": i for i in range(spec.N_VOCAB)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))


def convert(source: Path, folder: Path, path: Path) -> None:
    """What convert_hf_to_gguf.py --outtype f32 does with a model, with its own classes."""
    for entry in (str(source / "gguf-py"), str(source)):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    import conversion
    import gguf

    hparams = conversion.ModelBase.load_hparams(folder, False)
    converter = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))

    class WithoutVocabulary(converter):  # type: ignore[misc,valid-type]
        model_arch = converter.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            if f"{self.gguf_writer.arch}.vocab_size" not in self.gguf_writer.kv_data[0]:
                self.gguf_writer.add_vocab_size(spec.N_VOCAB)

    with torch.inference_mode():
        WithoutVocabulary(folder, gguf.LlamaFileType.ALL_F32, path).write()


def apply(net: Any, model: spec.Model, table: tuple[list[float], float] | None) -> None:
    """Let a model of transformers turn by theta_i / factors[i] and multiply cos and sin by the attention factor.

    Only Gemma's global layers get it. In latent attention (DeepSeek) the square of the factor multiplies the whole
    score, the part of a head without RoPE included, and cos and sin stay as they are: so llama.cpp does it, and so
    transformers does it for DeepSeek's own YaRN (yarn_apply_mscale).
    """
    factors, attn_factor = table or ([1.0] * (model.n_rot // 2), 1.0)
    theta = model.freq_base ** (-2.0 * np.arange(model.n_rot // 2) / model.n_rot)
    inv_freq = torch.from_numpy(theta / np.asarray(factors)).float()
    rotary = net.model.rotary_emb
    latent = model.gguf == "deepseek2"
    prefix = "full_attention_" if model.gguf == "gemma3" else ""
    old = getattr(rotary, prefix + "inv_freq")
    assert old.shape == inv_freq.shape, f"{model.hf} turns {2 * len(old)} dimensions, not {model.n_rot}"
    setattr(rotary, prefix + "inv_freq", inv_freq)
    setattr(rotary, prefix + "attention_scaling", 1.0 if latent else attn_factor)
    if latent:
        for layer in net.model.layers:
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * attn_factor**2


def forward(net: Any, run: spec.Run) -> Any:
    """Logits, float32 (n_tokens, n_vocab)."""
    ids = torch.tensor([run.tokens])
    positions = torch.arange(run.first, run.first + len(run.tokens))[None]
    with torch.no_grad():
        # a mask, lest positions that do not start at 0 be taken for several packed sequences
        result = net(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    return result.logits[0].numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
