"""The patched engine on Vulkan, all layers offloaded: Mesa's software device (lavapipe) stands for a GPU.

Its yardstick is its own distance from the CPU without a table: ggml's Vulkan kernels multiply in half precision.
Skipped, with the reason, where the backend cannot be compiled; a failure instead if MRROPE_NEED_VULKAN is set, as CI
does after tools/software_vulkan.sh. MRROPE_TEST_ENGINE_VULKAN names a folder with a libllama that is built already.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mrrope_gguf.engine import toolchain
from mrrope_gguf.paths import cache_dir
from tests import backend_checks as check
from tests import backends, tiny
from tests.backends import F16, F32, Q8_0, Job, Result
from tests.needs import cannot

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ICD = "/usr/share/vulkan/icd.d"
# vk::LayerSettingEXT came with it
HEADERS = 272
# a scenario's distance from the CPU, in units of that without a table; measured: 0.9 to 1.4
SLACK = 3
# a window and a half: the device is slow
TOKENS = tiny.tokens(96)


@pytest.fixture(scope="module")
def vulkan() -> Path:
    """The folder with the patched libllama of the Vulkan backend."""
    if named := os.environ.get("MRROPE_TEST_ENGINE_VULKAN"):
        return Path(named)
    if reason := missing():
        cannot(f"{reason}: tools/software_vulkan.sh installs what it takes", "MRROPE_NEED_VULKAN")
    from mrrope_gguf.engine.build import build

    with pytest.MonkeyPatch.context() as patch:
        # a cache of its own: an engine for a GPU would be what everything else runs on from now on
        patch.setenv("MRROPE_CACHE", str(cache_dir() / "tests-vulkan"))
        return build(backend="vulkan", rpc=False, server=False, say=print).lib


def missing() -> str | None:
    """Why the Vulkan backend cannot be compiled or run here; None if it can."""
    if not toolchain.available("vulkan"):
        return "no glslc or no Vulkan headers"
    if headers() < HEADERS:
        return f"the Vulkan headers are 1.3.{headers()} and llama.cpp needs 1.3.{HEADERS}"
    if software_device() is None:
        return "Mesa's software Vulkan device is not installed"
    return None


def headers() -> int:
    """The patch number of the Vulkan headers CMake will find, which grows from one minor version to the next."""
    folders = [os.environ[name] + "/include" for name in ("VULKAN_SDK",) if name in os.environ]
    for folder in (*folders, "/usr/include"):
        core = Path(folder) / "vulkan" / "vulkan_core.h"
        if core.exists() and (found := re.search(r"#define VK_HEADER_VERSION (\d+)", core.read_text("utf-8"))):
            return int(found[1])
    return 0


def software_device() -> Path | None:
    return next(iter(sorted(Path(ICD).glob("lvp_icd*.json"))), None)


def run(job: Job, lib: Path, **env: str) -> Result:
    """`job` on the software device. ggml offers a device that is a CPU only if it is asked for by number."""
    device = software_device()
    named = {"VK_ICD_FILENAMES": str(device), "VK_DRIVER_FILES": str(device)} if device else {}
    # Mesa 22's device frees a compute buffer twice if a bigger one takes its place after the first computation
    job = replace(job, devices=("Vulkan0",), reserve=True)
    return backends.run(job, lib, GGML_VK_VISIBLE_DEVICES="0", **named, **env)


def as_close_as_without_a_table(result: Result, cpu: Result) -> float:
    """Check it and return the yardstick: the distance from the CPU without a table."""
    yardstick = backends.distance(result["plain"], cpu["plain"])
    assert 0 < yardstick < 0.02
    check.same_as_cpu(result, cpu, SLACK * yardstick)
    return yardstick


@pytest.mark.parametrize("cache", [F32, F16, Q8_0], ids=check.CACHES.get)
def test_one_layer(cache: int, vulkan: Path, tmp_path: Path) -> None:
    job = check.job(check.model(tmp_path, "qwen3", 1), TOKENS, type_k=cache)
    result = run(job, vulkan)
    check.ran_on(result, "Vulkan0")
    yardstick = as_close_as_without_a_table(result, backends.run(job, vulkan))
    check.exact_in_one_layer(result, cache, noise=2 * yardstick)


def test_sliding_windows_and_flash_attention(vulkan: Path, tmp_path: Path) -> None:
    """gemma3: one global layer in six takes the table."""
    job = check.job(check.model(tmp_path, "gemma3", 6), TOKENS, flash=True)
    result = run(job, vulkan)
    check.ran_on(result, "Vulkan0")
    as_close_as_without_a_table(result, backends.run(job, vulkan))


def test_an_elastic_context(vulkan: Path, tmp_path: Path) -> None:
    """Keys on the device are rotated at each stage."""
    job = check.elastic_job(tmp_path, "llama", 2, tokens=TOKENS)
    result, cpu = run(job, vulkan), backends.run(job, vulkan)
    never = replace(check.job(check.model(tmp_path, "llama", 2), TOKENS), only=("plain",))
    yardstick = backends.distance(run(never, vulkan)["plain"], (plain := backends.run(never, vulkan)["plain"]))
    assert result.cache == {"Vulkan0"}
    assert check.stages(result) == check.stages(cpu)
    assert len(check.stages(result)) >= 2
    assert 0 < yardstick < 0.02
    assert backends.distance(result["plain"], cpu["plain"]) <= SLACK * yardstick
    later = slice(check.WINDOW, None)
    assert backends.distance(result["plain"][later], plain[later]) > 10 * SLACK * yardstick


def test_the_fused_rope_takes_the_table(vulkan: Path, tmp_path: Path) -> None:
    """ROPE and the write to the cache are one kernel, and its keys are those of the two kernels it replaces."""
    job = replace(check.job(check.model(tmp_path, "llama", 1), TOKENS), only=("plain", "table"))
    fused = run(job, vulkan, GGML_VK_PERF_LOGGER="1")
    apart = run(job, vulkan, GGML_VK_PERF_LOGGER="1", GGML_VK_DISABLE_FUSION="1")
    assert "ROPE_VIEW_SET_ROWS" in fused.stderr
    assert "ROPE_VIEW_SET_ROWS" not in apart.stderr
    assert backends.distance(fused["table"], apart["table"]) < 1e-3
    assert backends.distance(fused["table"], fused["plain"]) > 0.1
