"""native/mrrope.h by itself: what it refuses, that it compiles alone, and that it reads like llama.cpp."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import _native

HEADER = Path(__file__).parents[1] / "native" / "mrrope.h"
LLAMA2 = {"n_rot": 128, "freq_base": 1e4, "n_ctx_orig": 4096}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "rope"}, "method"),
        ({"n_rot": 127}, "n_rot"),
        ({"n_rot": -2}, "n_rot"),
        ({"freq_base": 1.0}, "freq_base"),
        ({"n_ctx_orig": 0}, "n_ctx_orig"),
        ({"scale": math.nan}, "scale"),
        ({"beta_slow": 0.0}, "beta_slow"),
        ({"base_factors": [1.0] * 32}, "base factors"),
        ({"base_factors": [0.0] * 64}, "base factors"),
        ({"method": "custom"}, "radix"),
        ({"method": "custom", "radix": [1.0] * 32}, "radix"),
        ({"method": "custom", "radix": [1e200] * 64}, "radix"),
        ({"method": "custom", "radix": [1.0] * 64, "lead": math.nan}, "radix"),
    ],
)
def test_the_header_refuses_by_status(change: dict[str, Any], words: str) -> None:
    fine = {"method": "mrrope-pro", **LLAMA2, "scale": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
    with pytest.raises(ValueError, match=words):
        _native.rope_table(**{**fine, "base_factors": None, "radix": None, "lead": 1.0, **change})


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_header_stands_alone(compiler: str, tmp_path: Path) -> None:
    """It compiles by itself without exceptions or RTTI, so that it can be copied into llama.cpp as it is."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on this machine")
    shutil.copy(HEADER, tmp_path)
    (tmp_path / "a.cpp").write_text('#include "mrrope.h"\nint main() { return mrrope_method_from_name("none"); }\n')
    flags = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([compiler, *flags, str(tmp_path / "a.cpp")], check=True)


def test_the_header_is_written_as_llama_cpp_is() -> None:
    text = HEADER.read_text(encoding="ascii")
    assert "\t" not in text
    assert max(len(line) for line in text.splitlines()) <= 125
    assert [line for line in text.splitlines() if line.startswith("#include")] == [
        "#include <cmath>",
        "#include <cstdint>",
    ]
