"""`inspect`: the report and its JSON for models of many kinds, extended files, and files that are no models."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from mrrope_gguf.architectures import architectures
from mrrope_gguf.errors import BadFile, FileTrouble
from mrrope_gguf.extend import extend
from mrrope_gguf.inspect import Inspection, inspect
from mrrope_gguf.tables import rope_table
from tests import gguf_bytes as raw
from tests import tiny
from tests.stock_hparams import BASE, write

Extended = Callable[..., Inspection]


@pytest.fixture
def extended(tmp_path: Path) -> Extended:
    """extended("llama", scale=4) -> the Inspection of a tiny model after `extend`."""

    def make(arch: str = "llama", rope_freqs: Any = None, extra: Any = None, **options: Any) -> Inspection:
        source = tiny.make(tmp_path / "tiny.gguf", arch, rope_freqs=rope_freqs, extra=extra)
        return inspect(extend(source, tmp_path / "long.gguf", **{"scale": 4.0, **options}).path)

    return make


def lines(found: Inspection) -> dict[str, str]:
    """The report's rows by label."""
    rows = re.findall(r"^  (\S[\w ]*?) {2,}(\S.*(?:\n {14}.*)*)", found.render(), re.MULTILINE)
    return {label: re.sub(r"\s+", " ", text) for label, text in rows}


def header(*kvs: bytes) -> bytes:
    return raw.gguf(list(kvs))


def text(key: str, value: str | bytes) -> bytes:
    return raw.kv(key, raw.STRING, raw.string(value))


def patched(path: Path, key: str, value: float) -> Path:
    """A copy of the file in which the last float32 or u32 under `key` is another number."""
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key)
    kind = struct.unpack_from("<I", content, at)[0]
    content[at + 4 : at + 8] = struct.pack("<f" if kind == raw.F32 else "<I", value)
    other = path.with_name("patched.gguf")
    other.write_bytes(content)
    return other


def test_a_plain_model(tmp_path: Path) -> None:
    found = inspect(tiny.make(tmp_path / "tiny.gguf"))
    data = found.to_json()
    assert data["table"] is data["obstacle"] is None
    assert data["context"] == {"original": 64, "trained": 64, "extended": None}
    rows = lines(found)
    assert rows["table"].startswith("none of ours")
    assert "NORM" in rows["rope"]
    assert "portable" in rows["extend"]


def test_a_portable_file(extended: Extended) -> None:
    found = extended("llama")
    expected = rope_table("mrrope-uni", n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=4)
    data: Any = found.to_json()
    assert data["context"] == {"original": 64, "trained": 256, "extended": 256}
    assert (data["table"]["method"], data["table"]["rendering"]) == ("mrrope-uni", "rope_freqs")
    assert data["table"]["factors"] == pytest.approx(expected.factor_values, rel=1e-6)
    assert (data["table"]["d_l"], data["table"]["d_h"]) == (expected.d_l, expected.d_h)
    assert data["table"]["attn_factor"] == pytest.approx(expected.attn_factor)
    assert data["warnings"] == []
    assert lines(found)["stock"] == "runs it extended, up to 256 tokens"


def test_an_engine_file(extended: Extended) -> None:
    found = extended("gemma3")
    assert found.stored is not None
    assert found.stored.rendering == "engine"
    rows = lines(found)
    assert "falls back to its own yarn scaling of factor 4" in rows["stock"]
    assert "5 layers see only 16 tokens" in found.render()
    assert "elastic" in rows["patched"]


@pytest.mark.parametrize("method", ["none", "linear", "ntk", "yarn", "yarn-turns", "mrrope-uni", "llama3"])
def test_every_method_reads_back_without_a_warning(extended: Extended, method: str) -> None:
    found = extended(method=method)
    expected = rope_table(method, n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=4)
    assert found.table is not None
    assert found.table.factor_values == pytest.approx(expected.factor_values, rel=1e-6)
    assert found.warnings == ()


def test_own_factors_stay_apart_from_the_table(extended: Extended) -> None:
    own = np.geomspace(1, 8, 8).astype(np.float32)
    found = extended(rope_freqs=own)
    data: Any = found.to_json()
    assert data["rope"]["base_factors"] == pytest.approx(own.tolist())
    assert max(data["table"]["factors"]) <= 4.0001
    assert found.warnings == ()
    assert "factors of the model's own" in found.render()


def test_a_reexpressed_file_says_so(extended: Extended) -> None:
    found = extended("qwen2", rendering="portable")
    assert found.stored is not None
    assert found.stored.reexpressed_from == "qwen2"
    assert any("LoRA" in warning for warning in found.warnings)
    assert found.file.architecture == "llama"


def test_contradictions_are_told(extended: Extended) -> None:
    path = Path(extended("llama").file.path)
    scaled = patched(path, "llama.rope.scaling.attn_factor", 2.0)
    assert any("two temperatures" in warning for warning in inspect(scaled).warnings)
    other = patched(path, "llama.rope.scaling.mrrope.scale", 8.0)
    warnings = " / ".join(inspect(other).warnings)
    assert "stored factors are not what mrrope-uni gives" in warnings
    assert "context_length is 256" in warnings
    newer = patched(path, "llama.rope.scaling.mrrope.version", 7)
    assert any("version 7" in warning for warning in inspect(newer).warnings)


def test_a_damaged_undo_record_is_told(extended: Extended) -> None:
    path = Path(extended("llama").file.path)
    content = bytearray(path.read_bytes())
    at = content.index(b"mrrope.undo") + len(b"mrrope.undo") + 4 + 8 + 40
    content[at : at + 4] = b"!!!!"
    path.write_bytes(content)
    assert any("revert" in warning for warning in inspect(path).warnings)


def test_a_damaged_table_is_an_obstacle(extended: Extended) -> None:
    path = patched(Path(extended("llama").file.path), "llama.rope.scaling.mrrope.scale", float("nan"))
    found = inspect(path)
    assert isinstance(found.obstacle, BadFile)
    assert "scale" in found.obstacle.why
    assert found.table is None


def test_a_split_model_by_any_of_its_files(tmp_path: Path) -> None:
    first = tiny.make(tmp_path / "tiny.gguf", split=3)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) == 3
    found = [inspect(shard) for shard in shards]
    assert all(one.file == found[0].file for one in found)
    assert found[0].file.shards == tuple(shard.name for shard in shards)
    assert found[0].file.nbytes == sum(shard.stat().st_size for shard in shards)
    assert first == shards[0]
    assert lines(found[0])["split"].startswith("3 files")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(text("general.architecture", "llama"), text("general.type", "adapter")), "a LoRA adapter"),
        (header(text("general.architecture", "clip"), text("general.name", "vision")), "a projector"),
        (header(text("general.architecture", "gpt9")), "unknown architecture 'gpt9'"),
        (header(text("general.name", "x")), "which architecture"),
    ],
)
def test_files_of_other_kinds_are_described_with_the_reason(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "thing.gguf"
    path.write_bytes(content)
    found = inspect(path)
    assert found.facts is None
    rows = lines(found)
    assert says in rows["obstacle"]
    assert rows["fix"]
    assert json.loads(json.dumps(found.to_json()))["obstacle"]["what"]


@pytest.mark.parametrize("name", sorted(architectures()))
def test_every_architecture_can_be_shown(tmp_path: Path, name: str) -> None:
    found = inspect(write(tmp_path / "m.gguf", name, BASE))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(data) == {"schema", "file", "context", "rope", "table", "bound", "engines", "obstacle", "warnings"}
    assert all(len(line) <= 100 for line in found.render().splitlines())


def test_models_scaled_by_their_makers(tmp_path: Path) -> None:
    keys = {
        **BASE,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 1024,
    }
    rows = lines(inspect(write(tmp_path / "m.gguf", "qwen2", keys)))
    assert rows["context"] == "4096 tokens, scaled by its makers from 1024"
    assert "refuses without --force" in rows["extend"]
    assert "bound" not in rows
    linear = lines(inspect(write(tmp_path / "l.gguf", "llama", {**BASE, "rope.scaling.factor": 2.0})))
    assert "merging its linear factor 2" in linear["extend"]


def test_a_portable_file_that_would_touch_sliding_layers_is_not_the_default(tmp_path: Path) -> None:
    keys = {**BASE, "attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False] * 4}
    rows = lines(inspect(write(tmp_path / "m.gguf", "granite_swa", keys)))
    assert "factors reach sliding layers too" in rows["extend"]


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "m\x1b[2Jodel.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("evil\x1b]0;owned\x07\u202egnp.exe")
    for key, value in BASE.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(path)
    shown = found.render()
    assert all(char == "\n" or char.isprintable() for char in shown)
    assert "evil\\e]0;owned\\x07\\u202egnp.exe" in shown
    assert found.file.model_name == "evil\x1b]0;owned\x07\u202egnp.exe"


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(text("general.architecture", "gpt2"), text("general.name", b"caf\xe9")))
    found = inspect(path)
    assert "caf\\xe9" in found.render()
    found.render().encode()


def test_what_is_no_gguf_raises(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble):
        inspect(tmp_path / "missing.gguf")
    (tmp_path / "x.gguf").write_bytes(b"not a model at all")
    with pytest.raises(BadFile):
        inspect(tmp_path / "x.gguf")


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inspect(tiny.make(tmp_path / "tiny.gguf"), plot=tmp_path / "factors.png")
    assert (tmp_path / "factors.png").read_bytes().startswith(b"\x89PNG")


def test_no_heavy_module_is_loaded(tmp_path: Path) -> None:
    path = tiny.make(tmp_path / "tiny.gguf")
    program = (
        "import sys; from mrrope_gguf.inspect import inspect; inspect(sys.argv[1]).render(); "
        "print([m for m in ('numpy', 'llama_cpp', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real
def test_gemma(gemma: Path) -> None:
    data: Any = inspect(gemma).to_json()
    assert data["file"]["quantisation"] == "Q4_K_M"
    assert data["rope"]["extended_layers"] == [5, 11, 17]
    assert data["bound"]["bound"] == 71627
    assert "patched engine" in data["engines"]["extend"]


@pytest.mark.real
def test_smollm2(smollm2: Path) -> None:
    data: Any = inspect(smollm2).to_json()
    assert data["file"]["quantisation"] == "Q4_1"
    assert data["file"]["n_parameters"] == 134515008
    assert data["engines"]["extend"].startswith("makes a portable file")


@pytest.mark.parametrize("keys", [{}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}])
@pytest.mark.parametrize(("rendering", "carrier"), [("engine", "engine"), ("auto", "rope_freqs")])
def test_engine_file_that_keeps_its_models_own_rope_freqs(
    extended: Extended, keys: dict[str, object], rendering: str, carrier: str
) -> None:
    found = extended(rope_freqs=[1, 1, 2, 4, 8, 8, 8, 8], extra=keys, rendering=rendering)
    assert found.stored is not None
    assert (found.stored.rendering, found.warnings) == (carrier, ())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_table_that_stock_would_scale_once_more(tmp_path: Path, scaled: bool) -> None:
    """rope.scaling.factor marks files for the patched engine; beside a tensor of the same table it misleads stock."""
    table = rope_table("mrrope-pro", n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=4)
    ours = {"version": 1, "method": "mrrope-pro", "scale": 4.0, "attn_factor": 1.0, "radix": list(table.radix_values)}
    extra: dict[str, Any] = {f"rope.scaling.mrrope.{word}": value for word, value in ours.items()}
    extra["rope.scaling.original_context_length"] = 64
    if scaled:
        extra |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    factors = list(table.factor_values)
    found = inspect(tiny.make(tmp_path / "m.gguf", n_ctx=256, rope_freqs=factors, extra=extra))
    assert found.stored is not None
    assert found.stored.rendering == ("engine" if scaled else "rope_freqs")
    assert any("scales on top of the table" in warning for warning in found.warnings) == scaled
