"""Names of ways: what each becomes, which are refused, and the tables and hashes they have for a model."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import Refused
from mrrope_gguf.evals.ways import STATIC, Way, known, parse, reach, scale_of
from mrrope_gguf.extend import extend
from mrrope_gguf.facts import RopeFacts, rope_facts
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.tables import rope_table
from tests import tiny
from tests.engine_models import LINEAR, OWN_FREQS, YARN


def facts_of(path: Path) -> RopeFacts:
    with open_gguf(path) as index:
        return rope_facts(index)


def made(folder: Path, **model: Any) -> RopeFacts:
    return facts_of(tiny.make(folder / "m.gguf", "llama", n_layer=1, n_ctx=64, **model))


def test_every_name() -> None:
    names = [name for name in known() if name != "elastic:mrrope-uni"]
    ways = parse(names, 4)
    assert [way.name for way in ways] == names
    for way in ways:
        bare = way.name.removeprefix("elastic:").removesuffix("@B")
        assert way.method == {"truncate": "none", "elastic": "mrrope-uni"}.get(bare, bare)
        assert way.mode == ("B" if "@" in way.name else "A" if way.name in STATIC else "C" if "el" in way.name else "")
        assert way.scale == (1.0 if way.kind in ("none", "truncate") else None if way.mode == "B" else 4.0)
    assert parse(" none , yarn ", 2) == parse(["none", "yarn"], 2)


def test_default_of_elastic_has_one_name() -> None:
    assert parse("elastic:mrrope-uni", 4) == parse("elastic", 4)
    with pytest.raises(Refused, match="'elastic' is named twice"):
        parse("elastic,elastic:mrrope-uni", 4)


@pytest.mark.parametrize(
    ("methods", "scale", "said"),
    [
        ("none,yran", 4, "unknown method 'yran'"),
        ("elastic:none", 4, "unknown method 'elastic:none'"),
        ("none@B", 4, "unknown method 'none@B'"),
        ("elastic@B", 4, "unknown method"),
        ("yarn,,none", 4, "unknown method ''"),
        ("yarn,none,yarn", 4, "'yarn' is named twice"),
        ("", 4, "no method was named"),
        ([], 4, "no method was named"),
        ("yarn", None, "scale is missing"),
        ("elastic", 1.0, "the scale is 1"),
        ("ntk", float("nan"), "the scale is nan"),
    ],
)
def test_refused(methods: Any, scale: float | None, said: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(methods, scale)
    assert said in str(caught.value)
    if "scale" not in said:
        assert all(name in caught.value.fix for name in ("none", "truncate", *STATIC, "elastic:METHOD", "@B"))


def test_no_scale_is_needed_without_a_fixed_table() -> None:
    assert [way.scale for way in parse("none,truncate,yarn@B")] == [1.0, 1.0, None]


def test_mode_b() -> None:
    assert [scale_of(n, 64) for n in (1, 64, 65, 256)] == [1.0, 1.0, 65 / 64, 4.0]
    (way,) = parse("yarn@B")
    assert way.at(256, 64) == Way("yarn@B", "static", "yarn", 4.0)
    assert [way.at(n, 64).plain for n in (64, 65)] == [True, False]
    assert way.at(256, 64).mode == "B"
    (fixed,) = parse("yarn", 2)
    assert fixed.at(None, 64) is fixed
    with pytest.raises(ValueError, match="no length"):
        way.at(None, 64)


@pytest.mark.parametrize("model", [{}, {"rope_freqs": OWN_FREQS}, {"extra": LINEAR}], ids=["plain", "freqs", "linear"])
def test_tables_are_those_extend_writes(tmp_path: Path, model: dict[str, Any]) -> None:
    facts = made(tmp_path, **model)
    for way in parse([*STATIC, "elastic:yarn", "mrrope-uni@B"], 3):
        done = extend(tmp_path / "m.gguf", tmp_path / "o.gguf", scale=3, method=way.method, dry_run=True)
        assert way.at(192, reach(facts)).table(facts) == done.table
    assert [way.table(facts) for way in parse("none,truncate")] == [None, None]


def test_hash_is_of_what_an_engine_gets(tmp_path: Path) -> None:
    facts = made(tmp_path)
    (way,) = parse("mrrope-pro", 4)
    table = rope_table("mrrope-pro", n_rot=16, freq_base=1e4, n_ctx_orig=64, scale=4)
    packed = struct.pack("<9f", *table.factor_values, table.attn_factor)
    assert way.table_sha256(facts) == hashlib.sha256(packed).hexdigest()


def test_hashes_tell_tables_apart(tmp_path: Path) -> None:
    facts, other = made(tmp_path), made(tmp_path, freq_base=5e4)
    ways = [*parse(STATIC, 4), *parse(["yarn", "mrrope-pro"], 3), *parse(["yarn@B", "mrrope-pro@B"])]
    assert len({way.table_sha256(facts) for way in ways}) == len(ways)
    changed = [way for way in ways if way.table_sha256(facts) != way.table_sha256(other)]
    assert {way.method for way in ways} - {way.method for way in changed} == {"linear", "ntk"}  # blind to the base
    assert parse("elastic", 4)[0].table_sha256(facts) == parse("mrrope-uni", 4)[0].table_sha256(facts)
    assert parse("none")[0].to_json(facts) == {"kind": "none", "method": "none", "scale": 1.0, "table_sha256": None}


def test_a_trained_scaling(tmp_path: Path) -> None:
    facts = made(tmp_path, extra={**YARN, "context_length": 256})
    (way,) = parse("linear", 4)
    with pytest.raises(Refused, match="already scales its RoPE"):
        way.table(facts, "m.gguf")
    assert way.table(facts, force=True) is not None
    assert (reach(facts), reach(facts, force=True)) == (256, 64)
