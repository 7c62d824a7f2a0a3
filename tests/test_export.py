"""Handing models over: what Ollama, LM Studio and llama-server are given, and what is refused with which fix."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.chat_template import FORMATS, TurnFormat, recognise, rendered
from mrrope_gguf.cli import main
from mrrope_gguf.engine import binding_version
from mrrope_gguf.engine.pins import pins
from mrrope_gguf.engine.store import Engine
from mrrope_gguf.errors import EngineTrouble, FileTrouble, Refused
from mrrope_gguf.export import Target, export
from mrrope_gguf.extend import extend
from mrrope_gguf.fetch import sha256
from tests import tiny

POSIX = pytest.mark.skipif(os.name != "posix", reason="runs the commands in a POSIX shell")
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe \"kind\".<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
)
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}{{ '<|assistant|>\n' }}"
SYSTEM, USER, ANSWER = (
    {"role": "system", "content": "Be\nbrief."},
    {"role": "user", "content": 'a "b"'},
    {"role": "assistant", "content": "c"},
)


@pytest.fixture(autouse=True)
def no_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, in which nothing is built, and a PATH without llama-server."""
    monkeypatch.setenv("MRROPE_CACHE", str(tmp_path / "cache"))
    for name in ("MRROPE_ENGINE", "LLAMA_CPP_LIB_PATH"):
        monkeypatch.delenv(name, raising=False)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if "llama" in name else real(name, *a, **k))
    return tmp_path / "cache" / "engines"


def made(folder: Path, arch: str = "llama", rendering: Any = "auto", **options: Any) -> Path:
    """A tiny model extended from 64 to 256 tokens."""
    source = tiny.make(folder / f"{arch}.gguf", arch, **options)
    return extend(source, scale=4, rendering=rendering).path


def build(folder: Path, **values: Any) -> Path:
    """A build with a llama-server in the store, as `mrrope build` leaves it; the program's path."""
    pin = pins()[binding_version() or ""]
    key = values.get("backend", "cpu")
    record = {
        "key": key, "pin": pin.release, "commit": pin.commit, "patch_hash": pin.patch_hash, "backend": key, "rpc": True,
        "server": True, "tests": False, "built": time.time(), **values,
    }  # fmt: skip
    engine = Engine(path=folder / key, **record)
    engine.bin.mkdir(parents=True)
    engine.lib.mkdir()
    engine.save()
    (engine.bin / "llama-server").write_text("#!/bin/sh\n")
    return engine.bin / "llama-server"


def commands(text: str) -> list[tuple[str, str]]:
    """A Modelfile's commands, read as Ollama's parser does: one a line, or a value between three quotes."""
    bare = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    found = re.findall(r'^([A-Z]+) (?:"""((?s:.*?))"""|([^\n]*))$', bare, re.MULTILINE)
    return [(name, quoted or plain) for name, quoted, plain in found]


def test_a_modelfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(tmp_path, extra={"tokenizer.chat_template": CHATML})
    assert main(["export", "ollama", str(model)]) == 0
    out, err = capsys.readouterr()
    assert commands(out) == [
        ("FROM", str(model)),
        ("PARAMETER", "num_ctx 256"),
        ("PARAMETER", 'stop "<|im_end|>"'),
        ("PARAMETER", 'stop "</s>"'),
        ("TEMPLATE", FORMATS[0].go),
        ("SYSTEM", 'Be "kind".'),
    ]
    assert "the table is static there: S = 4" in err
    assert "attn_factor 1.1386" in err
    assert "256 tokens take " in err
    assert "Ollama was not run" in err
    assert f"ollama create {model.stem.lower()} -f Modelfile" in err


def test_a_modelfile_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = made(tmp_path), tmp_path / "new" / "place"
    assert main(["export", "ollama", "-m", str(model), "-o", str(out), "-c", "128"]) == 0
    assert capsys.readouterr().out == f"{out / 'Modelfile'}\n"
    text = (out / "Modelfile").read_text()
    assert "PARAMETER num_ctx 128\n" in text
    assert [p.name for p in out.iterdir()] == ["Modelfile"]
    assert main(["export", "ollama", str(model), "-o", str(out)]) == 1
    assert "the file exists" in capsys.readouterr().err
    assert (out / "Modelfile").read_text() == text
    assert main(["export", "ollama", str(model), "-o", str(out), "-f"]) == 0
    assert "PARAMETER num_ctx 256\n" in (out / "Modelfile").read_text()


def test_a_template_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    found = export("ollama", made(tmp_path))
    assert "TEMPLATE" not in [name for name, _ in commands(found.text)]
    assert 'PARAMETER stop "</s>"' in found.text
    assert any("none of those that are known here" in note for note in found.notes)
    base = tiny.make(tmp_path / "base.gguf", extra={"tokenizer.chat_template": None})
    found = export("ollama", base)
    assert any("no chat template" in note for note in found.notes)
    assert any("not extended" in note for note in found.notes)
    assert "num_ctx 64" in found.text


def test_longrope_is_doubted(tmp_path: Path) -> None:
    long = {"rope_factors_long.weight": np.full(8, 2, np.float32), "rope_factors_short.weight": np.ones(8, np.float32)}
    keys = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}
    source = tiny.make(tmp_path / "long.gguf", tensors=long, extra=keys)
    model = extend(source, scale=4, force=True).path
    assert any("rope_factors_long" in note for note in export("ollama", model).notes)
    assert any("plain angles" in note for note in export("lmstudio", model, n_ctx=64).notes)


@pytest.mark.parametrize("target", ["ollama", "lmstudio"])
def test_an_engine_file_is_refused_and_the_fix_works(
    tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made(tmp_path, "qwen2")
    with pytest.raises(Refused) as caught:
        export(target, model)
    assert "cannot run this file extended" in caught.value.what
    found = re.match(r"`mrrope (.*)`, then export DST", caught.value.fix)
    assert found
    words = [str(tmp_path / "portable.gguf") if word == "DST" else word for word in shlex.split(found[1])]
    assert main(words) == 0
    capsys.readouterr()
    done = export(target, tmp_path / "portable.gguf")
    assert "256" in done.text + "".join(done.notes)


def test_an_engine_file_that_cannot_be_made_portable(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        export("ollama", made(tmp_path, "qwen3"))
    assert "cannot be re-expressed" in caught.value.why or "cannot be made portable" in caught.value.why
    assert "mrrope export llama-server" in caught.value.fix


def test_a_split_model(tmp_path: Path) -> None:
    model = made(tmp_path, split=3)
    with pytest.raises(Refused, match="the model is in 3 files"):
        export("ollama", model)
    assert export("llama-server", model).text == f"llama-server -m {model} -c 256"
    found = export("lmstudio", model, tmp_path / "library")
    paths = [Path(line) for line in found.text.split("\n")]
    assert [path.name for path in paths] == [f"llama-ContextLength256-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert paths[0].parent == tmp_path / "library" / "mrrope" / "llama-ContextLength256"
    assert all(os.path.samefile(path, tmp_path / path.name) for path in paths)


@pytest.mark.parametrize("target", ["ollama", "lmstudio", "llama-server"])
def test_more_context_than_the_file_has(tmp_path: Path, target: Target) -> None:
    with pytest.raises(Refused, match="300 tokens of context, and the file has 256") as caught:
        export(target, made(tmp_path), n_ctx=300)
    assert "--ctx 300" in caught.value.fix


@POSIX
def test_the_commands_for_lm_studio_do_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "it's here").mkdir()
    model = made(tmp_path / "it's here")
    assert main(["export", "lmstudio", str(model)]) == 0
    out, err = capsys.readouterr()
    subprocess.run(["sh", "-ec", out], check=True, env={**os.environ, "HOME": str(tmp_path / "home")})
    placed = tmp_path / "home/.lmstudio/models/mrrope" / model.stem / model.name
    assert os.path.samefile(placed, model)
    assert f"lms load mrrope/{model.stem} --context-length 256" in err
    assert "LM Studio was not run" in err


def test_lm_studio_by_link_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, library = made(tmp_path), tmp_path / "models"
    for _ in range(2):  # what is there already is left
        assert main(["export", "lmstudio", str(model), "-o", str(library)]) == 0
        out, err = capsys.readouterr()
        assert os.path.samefile(out.strip(), model)
        assert "second name" in err
    other = made(library)
    with pytest.raises(FileTrouble, match="the file exists"):
        export("lmstudio", other, library)
    assert os.path.samefile(out.strip(), model)
    export("lmstudio", other, library, force=True)
    assert os.path.samefile(out.strip(), other)


def test_lm_studio_by_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path)
    real = os.link

    def other_disk(src: Any, dst: Any, **options: Any) -> None:
        if Path(src).resolve() == model.resolve():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(src, dst, **options)

    monkeypatch.setattr(os, "link", other_disk)
    found = export("lmstudio", model, tmp_path / "models")
    assert sha256(Path(found.text)) == sha256(model)
    assert not os.path.samefile(found.text, model)
    assert not any("second name" in note for note in found.notes)
    assert [p.name for p in Path(found.text).parent.iterdir()] == [model.name]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    model = made(tmp_path)
    (tmp_path / "file").write_text("")
    for target in ("ollama", "lmstudio"):
        with pytest.raises(FileTrouble):
            export(target, model, tmp_path / "file" / "x")


def test_llama_server_for_a_portable_file(tmp_path: Path, no_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path)
    found = export("llama-server", model)
    assert found.text == f"llama-server -m {model} -c 256"
    assert any("mrrope build" in note for note in found.notes)
    static = extend(tmp_path / "llama.gguf", tmp_path / "static.gguf", scale=4, elastic=False).path
    server = build(no_engines)
    assert export("llama-server", model, n_ctx=128).text == f"{server} -m {model} -c 128 --rope-elastic on"
    assert export("llama-server", static).text == f"{server} -m {static} -c 256"  # there is no other on the PATH
    monkeypatch.setenv("MRROPE_ENGINE", "stock")
    found = export("llama-server", model)
    assert found.text == f"llama-server -m {model} -c 256"
    assert any("a stock one knows neither elastic context" in note for note in found.notes)


def test_llama_server_for_an_engine_file(tmp_path: Path, no_engines: Path) -> None:
    model = made(tmp_path, "qwen3")
    with pytest.raises(EngineTrouble) as caught:
        export("llama-server", model)
    assert "`mrrope build`" in caught.value.fix
    assert f"llama-server -m {model} -c 256 --rope-elastic on" in caught.value.fix
    assert "no engine is built at all" in caught.value.why
    build(no_engines, backend="vulkan", patch_hash="another")
    with pytest.raises(EngineTrouble) as caught:
        export("llama-server", model)  # as `mrrope serve` would
    assert "of 1 builds none is of this version's patch" in caught.value.why
    cpu = build(no_engines, backend="cpu")
    assert export("llama-server", model).text == f"{cpu} -m {model} -c 256 --rope-elastic on"
    gpu = build(no_engines, backend="cuda")
    assert export("llama-server", model).text == f"{gpu} -m {model} -c 256 --rope-elastic on"


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["export", "gpt4all", str(model)])
    assert stop.value.code == 2
    assert main(["export", "llama-server", str(model), "-o", str(tmp_path)]) == 1
    assert main(["export", "ollama", str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf" in capsys.readouterr().err


@POSIX
def test_names_that_command_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(tmp_path).rename(tmp_path / "x\x1b[2J.gguf")
    with pytest.raises(Refused, match="cannot be written down"):
        export("ollama", model)
    assert main(["export", "lmstudio", str(model)]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [(CHATML, "chatml", 'Be "kind".'), (LLAMA3, "llama3", ""), (GEMMA, "gemma", ""), (ZEPHYR, "zephyr", "")],
)
def test_templates_are_recognised(template: str, name: str, system: str) -> None:
    found = recognise(template, bos="<bos>", eos="</s>")
    assert found
    assert (found.format.name, found.system) == (name, system)


@pytest.mark.parametrize(
    "template",
    [
        tiny.CHAT_TEMPLATE,
        CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor"),
        LLAMA3.replace("{{ m.content | trim }}", "{{ m.content | upper }}"),
        GEMMA.replace("model\n'", "model\n<think>'"),
        "{% for m in messages %}{{ m.nothing.at.all }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_templates_that_are_a_little_different_are_not(template: str) -> None:
    assert recognise(template, bos="<bos>", eos="</s>") is None


def test_a_template_runs_in_a_sandbox() -> None:
    assert rendered("{{ ''.__class__.__mro__[1].__subclasses__() }}", [USER]) is None


@pytest.mark.real
def test_smollm2_is_chatml_with_a_system_message(smollm2: Path) -> None:
    found = commands(export("ollama", smollm2).text)
    assert ("SYSTEM", "You are a helpful AI assistant named SmolLM, trained by Hugging Face") in found
    assert ("TEMPLATE", FORMATS[0].go) in found
    assert ("PARAMETER", "num_ctx 8192") in found


GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var in []struct {
		Template string
		Messages []struct{ Role, Content string }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	for _, one := range in {
		t := template.Must(template.New("").Parse(one.Template))
		if err := t.Execute(os.Stdout, one); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose template language Ollama has")
def test_go_renders_what_the_formats_say(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    talks = ([USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER])
    jobs: list[tuple[TurnFormat, Any]] = [(known, talk) for known in FORMATS for talk in talks]
    asked = json.dumps([{"Template": known.go, "Messages": talk} for known, talk in jobs])
    env = {**os.environ, "GOCACHE": str(tmp_path / "go"), "GOFLAGS": "", "GO111MODULE": "off"}
    command = ["go", "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split("\0")[:-1] == [known.render(talk) for known, talk in jobs]


@pytest.mark.engine
@pytest.mark.real
@pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama-server: `make test-full`")
def test_the_command_starts_the_server(programs: Path, smollm2: Path, tmp_path: Path, no_engines: Path) -> None:
    """What is printed, run as it is, but for a port of its own."""
    from tests.server import ask, serving

    no_engines.mkdir(parents=True)
    (no_engines / programs.parent.name).symlink_to(programs.parent)
    model = extend(smollm2, tmp_path / "long.gguf", scale=2, rendering="engine").path
    words = shlex.split(export("llama-server", model, n_ctx=10240).text)
    with serving(Path(words[0]).parent, *words[1:]) as address:
        props = ask(address, "/props")
        assert props["rope"] == {"method": "mrrope-pro", "scale": 2.0, "elastic": True}
        assert props["default_generation_settings"]["n_ctx"] == 10240
