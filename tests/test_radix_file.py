"""Tables from JSON: every form that is read, and one named refusal per way to be wrong."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mrrope_gguf.errors import FileTrouble, MrropeError
from mrrope_gguf.radix_file import RadixFile, read_radix
from mrrope_gguf.tables import rope_table

RADIX = [1.0, 1.5, 2.0, 1.0]


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_bare_list_is_a_radix(tmp_path: Path) -> None:
    assert read_radix(write(tmp_path, RADIX)) == RadixFile((1.0, 1.5, 2.0, 1.0), 1.0, None, None)


def test_an_object_with_a_radix_and_its_facts(tmp_path: Path) -> None:
    path = write(tmp_path, {"radix": RADIX, "lead": 1.25, "scale": 4, "attn_factor": 1.1})
    assert read_radix(path, 4) == RadixFile((1.0, 1.5, 2.0, 1.0), 1.25, 4.0, 1.1)


def test_factors(tmp_path: Path) -> None:
    got = read_radix(write(tmp_path, {"factors": [1, 1, 2, 5], "scale": 5}), 4)
    assert got == RadixFile((1.0, 2.0, 2.5, 1.0), 1.0, 5.0, None)


def test_factors_that_do_not_start_at_one_keep_their_lead(tmp_path: Path) -> None:
    got = read_radix(write(tmp_path, {"factors": [1.25, 2.5]}))
    assert (got.lead, got.radix) == (1.25, (2.0, 1.0))


def test_whatever_is_read_makes_the_table_it_says(tmp_path: Path) -> None:
    factors = [1.08, 1.11, 0.9, 1.14, 2.5, 30.0, 59.5, 64.8]
    got = read_radix(write(tmp_path, {"factors": factors}), 8)
    facts = {"n_rot": 16, "freq_base": 1e4, "n_ctx_orig": 4096}
    table = rope_table("custom", scale=32, radix=got.radix, lead=got.lead, **facts)  # type: ignore[arg-type]
    assert list(table.factors) == pytest.approx(factors, rel=1e-14)


def test_longrope_arrays_give_the_long_table(tmp_path: Path) -> None:
    got = read_radix(write(tmp_path, {"long_factor": [1.0, 2.0, 4.0], "short_factor": [1.0, 1.0, 1.0]}), 3)
    assert got == RadixFile((2.0, 2.0, 1.0), 1.0, None, None)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_hugging_face_config(tmp_path: Path, key: str) -> None:
    """As Phi-3's: lengths beside the arrays, scale and temperature follow from them."""
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "model_type": "phi3",
        key: {"type": "longrope", "long_factor": [1.08, 1.25, 30.0], "short_factor": [1.0, 1.0, 1.0]},
    }
    got = read_radix(write(tmp_path, config), 3)
    assert got.scale == 32.0
    assert got.lead == 1.08
    assert got.attn_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert read_radix(write(tmp_path, {"text_config": config}), 3) == got


@pytest.mark.parametrize("key", ["attention_factor", "long_mscale"])
def test_a_temperature_that_is_written_down_counts(tmp_path: Path, key: str) -> None:
    rope = {"long_factor": [1.0, 2.0], "factor": 16, key: 1.25, "original_max_position_embeddings": 4096}
    got = read_radix(write(tmp_path, {"rope_scaling": rope}))
    assert (got.scale, got.attn_factor) == (16.0, 1.25)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[1.0, 2.0]", encoding="utf-8-sig")
    assert read_radix(str(tmp_path / "t.json")).radix == (1.0, 1.0)


BAD = {
    "not JSON": ("{radix: 1}", "is not JSON"),
    "empty": ("", "is not JSON"),
    "nested too deep": ("[" * 100_000, "is not JSON|not a list of numbers|t.json"),
    "a number": ("4", "holds no rope table.*\n.*it holds 4"),
    "a string": ('"radix"', "holds no rope table"),
    "null": ("null", "holds no rope table.*\n.*it holds null"),
    "no array": ('{"scale": 4}', "neither radix nor factors"),
    "both arrays": ('{"radix": [1, 1], "factors": [1, 1]}', "both radix and factors"),
    "an empty list": ("[]", "radix is a list of 0"),
    "a list that is none": ('{"factors": 4}', "factors is 4, not a list of numbers"),
    "NaN": ("[1.0, NaN]", r"radix\[1\] is NaN.*\n.*finite number above 0"),
    "infinity": ("[Infinity, 1.0]", r"radix\[0\] is Infinity"),
    "zero": ("[1.0, 0]", r"radix\[1\] is 0\n"),
    "negative": ('{"factors": [1.0, -2]}', r"factors\[1\] is -2"),
    "words": ('[1.0, "2"]', r'radix\[1\] is "2"'),
    "true": ("[true, 1.0]", r"radix\[0\] is true"),
    "null in it": ("[null, 1.0]", r"radix\[0\] is null"),
    "a list in it": ("[[1.0], 1.0]", r"radix\[0\] is a list of 1"),
    "past float32": ("[1e39, 1.0]", r"radix\[0\] is 1e\+39"),
    "an endless integer": ("[" + "9" * 400 + ", 1]", r"radix\[0\] is 999"),
    "a product past float32": ("[1e30, 1e30, 1.0]", "multiplies to factors from 1 to 1e\\+60"),
    "a product past double": ("[" + "1e38, " * 20 + "1.0]", "must multiply to finite"),
    "scale below one": ('{"radix": [1.0, 1.0], "scale": 0.5}', "scale is 0.5"),
    "scale no number": ('{"radix": [1.0, 1.0], "scale": "4"}', 'scale is "4"'),
    "temperature zero": ('{"radix": [1.0, 1.0], "attn_factor": 0}', "attn_factor is 0"),
    "lead zero": ('{"radix": [1.0, 1.0], "lead": 0}', "lead is 0"),
    "lead null": ('{"radix": [1.0, 1.0], "lead": null}', "lead is null"),
    "longrope no list": ('{"rope_scaling": {"long_factor": null}}', "long_factor is null"),
    "longrope lengths": (
        '{"long_factor": [1.0], "max_position_embeddings": "x", "original_max_position_embeddings": 4096}',
        'max_position_embeddings is "x"',
    ),
    "longrope shrinks": (
        '{"long_factor": [1.0], "max_position_embeddings": 2048, "original_max_position_embeddings": 4096}',
        "scale is 0.5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    with pytest.raises(MrropeError, match=words) as caught:
        read_radix(write(tmp_path, content))
    assert caught.value.what.startswith("t.json: ")
    assert caught.value.why
    assert caught.value.fix


def test_a_wrong_length_gives_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(MrropeError, match="radix has 4 numbers, the model has 32 rotary pairs") as caught:
        read_radix(write(tmp_path, RADIX), 32)
    assert "give 32 numbers" in caught.value.fix
    with pytest.raises(MrropeError, match="long_factor has 2 numbers, the model has 4"):
        read_radix(write(tmp_path, {"long_factor": [1, 2]}), 4)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"GGUF\xff\xfe\x00")
    with pytest.raises(MrropeError, match="it is not text"):
        read_radix(tmp_path / "t.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileTrouble, match=r"t\.json: cannot be read"):
        read_radix(tmp_path / "t.json")
    with pytest.raises(FileTrouble):
        read_radix(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names")
def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(FileTrouble, match="cannot be read") as caught:
            read_radix(path)
        assert "no regular file" in caught.value.why


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "r.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileTrouble, match="cannot be read") as caught:
        read_radix(tmp_path / "r.json")
    assert str(1 << 40) in caught.value.why
