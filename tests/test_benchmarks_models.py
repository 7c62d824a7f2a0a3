"""`python -m benchmarks.elastic_models`: a model widened once, its path printed, its values what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from benchmarks import elastic_models
from mrrope_gguf import fetch
from tests import tiny


def test_widened_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.make(tmp_path / "m.gguf", n_layer=1)
    monkeypatch.setattr(fetch, "fetch", lambda resource: source)
    elastic_models.main(["smollm2"])
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "m.widened-f16.gguf"
    made = {each.name: each for each in GGUFReader(path).tensors}
    for each in GGUFReader(source).tensors:
        got, wanted = made[each.name], dequantize(each.data, each.tensor_type)
        assert got.tensor_type == (GGMLQuantizationType.F16 if len(each.shape) > 1 else GGMLQuantizationType.F32)
        np.testing.assert_array_equal(got.data.reshape(-1), wanted.astype(got.data.dtype).reshape(-1))
    before = path.stat().st_mtime_ns
    elastic_models.main([])  # both names, and nothing is made again
    assert capsys.readouterr().out.splitlines() == [str(path)] * 2
    assert path.stat().st_mtime_ns == before


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        elastic_models.main(["llama"])
    assert "llama: no such model; there are smollm2, gemma3" in capsys.readouterr().err
