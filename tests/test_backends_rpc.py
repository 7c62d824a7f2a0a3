"""The patched engine on remote devices: RPC servers on the loopback interface hold every layer, or half of them each.

A server computes on this machine's CPU, so nothing may be lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import backend_checks as check
from tests import backends
from tests.backends import F16, Q8_0

pytestmark = pytest.mark.engine
# measured: 0, bit for bit, on every tiny model
TOLERANCE = 1e-6
Servers = tuple[str, str]


@pytest.fixture(scope="module")
def servers(patched: Path) -> Iterator[Servers]:
    program = patched.parent / "bin" / "ggml-rpc-server"
    with backends.rpc_server(program) as first, backends.rpc_server(program) as second:
        yield first, second


@pytest.mark.parametrize("cache", check.CACHES, ids=check.CACHES.get)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_one_layer_on_a_server(arch: str, cache: int, patched: Path, servers: Servers, tmp_path: Path) -> None:
    job = check.job(check.model(tmp_path, arch, 1), type_k=cache)
    cpu = backends.run(job, patched)
    check.exact_in_one_layer(cpu, cache)
    remote = backends.run(replace(job, devices=("RPC0",), endpoints=servers[:1]), patched)
    check.ran_on(remote, f"RPC0[{servers[0]}]")
    check.exact_in_one_layer(remote, cache)
    check.same_as_cpu(remote, cpu, TOLERANCE)


@pytest.mark.parametrize(("arch", "n_layer", "cache"), [("qwen3", 5, F16), ("qwen3", 5, Q8_0), ("gemma3", 12, F16)])
def test_layers_split_between_two_servers(
    arch: str, n_layer: int, cache: int, patched: Path, servers: Servers, tmp_path: Path
) -> None:
    """gemma3's two global layers of twelve take the table, one on each server; its sliding ones do not."""
    job = check.job(check.model(tmp_path, arch, n_layer), type_k=cache)
    split = backends.run(replace(job, devices=("RPC0", "RPC1"), endpoints=servers), patched)
    check.ran_on(split, *(f"RPC0[{server}]" for server in servers))
    check.same_as_cpu(split, backends.run(job, patched), TOLERANCE)


@pytest.mark.parametrize(("arch", "n_layer", "cache"), [("llama", 4, F16), ("qwen3", 5, Q8_0), ("gemma3", 12, F16)])
def test_an_elastic_context_on_two_servers(
    arch: str, n_layer: int, cache: int, patched: Path, servers: Servers, tmp_path: Path
) -> None:
    """The keys that are rotated at each stage lie on both servers."""
    job = check.elastic_job(tmp_path, arch, n_layer, type_k=cache)
    cpu = backends.run(job, patched)
    split = backends.run(replace(job, devices=("RPC0", "RPC1"), endpoints=servers), patched)
    assert split.cache == {f"RPC0[{server}]" for server in servers}
    assert check.stages(split) == check.stages(cpu)
    assert len(check.stages(split)) >= 3
    assert backends.distance(split["plain"], cpu["plain"]) <= TOLERANCE
    never = backends.run(replace(job, model=check.model(tmp_path, arch, n_layer)), patched)
    within = slice(0, check.WINDOW)
    assert (cpu["plain"][within] == never["plain"][within]).all()
    assert backends.distance(cpu["plain"][check.WINDOW :], never["plain"][check.WINDOW :]) > 1e-3
