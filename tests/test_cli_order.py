"""Words of the command line in any order: before, between and after the options, and behind an option's own list."""

from __future__ import annotations

import argparse
import shlex

import pytest

from mrrope_gguf.cli import _parsed, _parser, _place_model, main


def parsed(line: str) -> argparse.Namespace:
    parser = _parser()
    args = _parsed(parser, shlex.split(line))
    if "model" in args:
        _place_model(parser, args)
    return args


@pytest.mark.parametrize(
    "line",
    [
        "eval kl m.gguf --lengths 8k --text a.txt b.txt",
        "eval kl --lengths 8k m.gguf --text a.txt b.txt",
        "eval kl --lengths 8k --text a.txt b.txt -- m.gguf",
        "eval kl --lengths 8k --text a.txt b.txt m.gguf",
        "eval --lengths 8k kl --text a.txt b.txt -m m.gguf",
        "eval --lengths 8k --text a.txt b.txt kl m.gguf",
        "eval --text a.txt b.txt kl --lengths 8k m.gguf",
        "eval m.gguf kl --lengths 8k --text a.txt b.txt",
        "eval m.gguf --lengths 8k kl --text a.txt b.txt",
        "eval m.gguf --text a.txt b.txt kl --lengths 8k",
        "eval --text a.txt --lengths 8k --text b.txt m.gguf kl",
        "eval -m m.gguf --text a.txt b.txt kl --lengths 8k",
    ],
)
def test_eval_in_any_order(line: str) -> None:
    args = parsed(line)
    assert (args.what, args.model, args.texts, args.lengths) == ("kl", "m.gguf", ["a.txt", "b.txt"], [8192])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("figure factors --out x.png m.gguf", "model", "m.gguf"),
        ("export ollama -c 8k m.gguf", "model", "m.gguf"),
        ("fit -c 8k m.gguf", "model", "m.gguf"),
        ("extend m.gguf --scale 4 out.gguf", "dst", "out.gguf"),
        ("revert m.gguf -f out.gguf", "dst", "out.gguf"),
        ("texts a --json b c", "names", ["a", "b", "c"]),
        ("texts --json a", "names", ["a"]),
        ("chat -f a.txt b.pdf m.gguf", "gguf", "m.gguf"),
        ("chat m.gguf -f a.txt b.gguf", "gguf", "m.gguf"),
        ("chat -m m.gguf -f a.txt b.gguf", "file", ["a.txt", "b.gguf"]),
        ("chat -hf user/model -f a.txt b.gguf", "file", ["a.txt", "b.gguf"]),
        ("eval retrieval --file kv.jsonl m.gguf", "files", ["kv.jsonl"]),
        ("eval kl kl", "model", "kl"),
    ],
)
def test_words_go_where_they_belong(line: str, name: str, value: object) -> None:
    assert getattr(parsed(line), name) == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("eval", "WHAT is none of ppl, kl"),
        ("eval m.gguf", "WHAT is none of ppl, kl"),
        ("eval nothing m.gguf", "WHAT is none of ppl, kl"),
        ("eval kl", "eval needs a model file"),
        ("eval kl --text m.gguf", "eval needs a model file"),
        ("eval kl a.gguf --lengths 8k b.gguf", "unrecognized arguments: b.gguf"),
        ("eval kl -m a.gguf --lengths 8k b.gguf", "the model is named twice"),
        ("eval kl a.gguf --no-such 3", "unrecognized arguments: --no-such 3"),
        ("extend a.gguf --scale 4 b.gguf c.gguf", "unrecognized arguments: c.gguf"),
        ("inspect a.gguf --json b.gguf", "unrecognized arguments: b.gguf"),
    ],
)
def test_what_belongs_nowhere_is_exit_2(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
