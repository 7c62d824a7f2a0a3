"""lm-evaluation-harness itself, offline, on task files of its own kind: through Python and through `mrrope lm-eval`."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrrope_gguf.errors import MrropeError
from mrrope_gguf.evals.lm_eval_run import evaluate
from mrrope_gguf.evals.losses import token_nll
from mrrope_gguf.model import load
from tests import patched, tiny

pytestmark = pytest.mark.engine

PLAIN: dict[str, Any] = {"flash_attn": False, "n_threads": 1, "n_threads_batch": 1}
TEXTS = ["the other inn on the hill is a tin river " * 3, "in it the heron", "an otter in the other river"]
QUESTIONS = [
    {"question": "the river in the hill", "choices": [" tin", " inn", " the other one"], "gold": 1},
    {"question": "an otter in it", "choices": [" a", " on", " in the tin"], "gold": 2},
    {"question": "the heron on the inn", "choices": [" of", " the", " an otter"], "gold": 0},
]
TASKS: dict[str, str] = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}} is"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "roll": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
- {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n", "r"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("harness") / "m.gguf", n_ctx=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files and their data, and nothing that lies elsewhere."""
    where = tmp_path_factory.mktemp("tasks")
    (where / "roll.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("choose", "say"):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, lines in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{where / name}.jsonl'}}}}\ntest_split: test"
        (where / f"{name}.yaml").write_text(f"task: {name}\n{data}{lines}metadata: {{version: 1}}\n")
    return where


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which data sets come from files alone, and are cached apart."""
    home = tmp_path_factory.mktemp("hub")
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LM_HARNESS_CACHE_PATH": str(home)}


def harness(path: Path, folder: Path, out: Path) -> dict[str, Any]:
    """simple_evaluate with a path, a Llama, by the registered name and shot by shot; then a stopped run."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mrrope_gguf.evals.lm_eval import MrropeLM

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    how: dict[str, Any] = {"task_manager": manager, "tasks": [*TASKS], "bootstrap_iters": 0}
    found: dict[str, Any] = {}
    with MrropeLM(path, **PLAIN) as lm:
        found["path"] = simple_evaluate(model=lm, **how)
        found["shots"] = simple_evaluate(model=lm, **how, num_fewshot=2)
        found["chat"] = simple_evaluate(model=lm, **how, apply_chat_template=True)
    llm = load(path, **PLAIN)
    found["llama"] = simple_evaluate(model=MrropeLM(llm), **how)
    llm.close()
    arguments = f"model={path},flash_attn=False,n_threads=1,n_threads_batch=1"
    found["name"] = simple_evaluate(model="mrrope", model_args=arguments, device="cpu", batch_size=1, **how)
    say: list[str] = []
    own = {"include_path": folder, "include_defaults": False, "out": out, "say": say.append, **PLAIN}
    for limit in (1, None, None):
        found["kept"] = evaluate(path, [*TASKS], **own, limit=limit)
    found["other"] = evaluate(path, [*TASKS], **own, method="mrrope-uni", scale=2)
    found["said"] = [line for line in say if "decoded" in line]
    return found


@pytest.fixture(scope="module")
def found(
    path: Path, folder: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    return {**patched.run(harness, path, folder, out, lib=None, env=offline), "out": out}


def test_multiple_choice(path: Path, found: dict[str, Any]) -> None:
    """Each choice's likelihood by one pass over the whole text, and the accuracy that follows from them."""
    llm, right = load(path, **PLAIN), 0
    for sample, question in zip(found["path"]["samples"]["choose"], QUESTIONS, strict=True):
        context, likelihoods = f"{question['question']} is", []
        n = len(llm.tokenize(context.encode()))
        for choice in question["choices"]:  # type: ignore[attr-defined]
            tokens = llm.tokenize((context + choice).encode())
            likelihoods.append(-float(token_nll(llm, tokens)[n - 1 :].sum()))
        told = [float(response[0][0]) for response in sample["resps"]]
        assert told == pytest.approx(likelihoods, abs=1e-3)
        right += int(np.argmax(likelihoods)) == question["gold"]
    llm.close()
    assert found["path"]["results"]["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_rolling_is_our_own_perplexity(path: Path, found: dict[str, Any]) -> None:
    llm = load(path, **PLAIN)
    losses = [token_nll(llm, llm.tokenize(text.encode(), add_bos=True)) for text in TEXTS]
    llm.close()
    total = sum(float(each.sum(dtype="float64")) for each in losses)
    results = found["path"]["results"]["roll"]
    n_bytes, n_words = sum(len(text.encode()) for text in TEXTS), sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(total / n_bytes), rel=1e-9)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(total / n_words), rel=1e-9)


def test_texts(found: dict[str, Any]) -> None:
    said = [sample["resps"][0][0] for sample in found["path"]["samples"]["say"]]
    assert all(said)
    assert not any("r" in text or "\n" in text for text in said)


def test_every_way_in_gives_the_same(found: dict[str, Any]) -> None:
    for way in ("llama", "name"):
        assert found[way]["results"] == found["path"]["results"]
    assert found["kept"].results["results"]["roll"]["byte_perplexity,none"] == pytest.approx(
        found["path"]["results"]["roll"]["byte_perplexity,none"], rel=1e-12
    )


def test_examples_and_chat_template_reach_the_model(found: dict[str, Any]) -> None:
    first = {name: found[name]["samples"]["say"][0]["arguments"][0][0] for name in ("path", "shots", "chat")}
    question = QUESTIONS[0]["question"]
    assert first["path"] == question
    assert first["chat"] == f"user: {question}\nassistant:"
    assert found["shots"]["samples"]["choose"][0]["arguments"][0][0].count(" is ") == 2
    info = found["path"]["config"]
    assert info["model"] == "MrropeLM"
    assert info["model_file"]["name"] == "m.gguf"
    assert info["max_length"] == 512


def test_a_stopped_run_goes_on(found: dict[str, Any]) -> None:
    """One document of each task, all of them, the same again, another way: what is known is not decoded again."""
    decoded = [int(re.findall(r"(\d+) tokens decoded", line)[0]) for line in found["said"]]
    assert decoded[0] > 0
    assert decoded[1] > 0
    assert decoded[2] == 0
    assert decoded[3] == pytest.approx(decoded[0] + decoded[1], rel=0.3)
    results = [json.loads(path.read_text()) for path in sorted(found["out"].glob("results_*.json"))]
    assert results[-1]["results"]
    assert [path for path in found["other"].files if not path.is_file()] == []
    samples = next(path for path in found["other"].files if path.name.startswith("samples_choose"))
    assert len(samples.read_text().splitlines()) == len(QUESTIONS)
    assert len(list(found["out"].glob("answers-*.db"))) == 2


def run_cli(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mrrope_gguf", "lm-eval", *words],
        env=patched.environment(None, env), cwd=patched.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command(path: Path, folder: Path, offline: dict[str, str], found: dict[str, Any]) -> None:
    words = ["-m", str(path), "--tasks", "choose,ro*", "--include-path", str(folder), "-t", "1"]
    done = run_cli(*words, "--method", "none", "--apply-chat-template", "--num-fewshot", "1", env=offline)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows[0][:5] == ["Tasks", "Version", "Filter", "n-shot", "Metric"]
    assert {row[4] for row in rows[2:]} == {"acc", "byte_perplexity", "word_perplexity"}
    assert [row[3] for row in rows if row[0] == "choose"] == ["1"]
    assert "tokens decoded" in done.stderr


def test_without_lm_eval(path: Path) -> None:
    """The module can be imported, and both ways in name the extra."""
    code = (
        "import sys\nsys.modules['lm_eval'] = None\nfrom mrrope_gguf.cli import main\n"
        "from mrrope_gguf.errors import MrropeError\nfrom mrrope_gguf.evals.lm_eval import MrropeLM\n"
        f"print(main(['lm-eval', r'{path}', '--tasks', 'a']))\n"
        f"try: MrropeLM(r'{path}')\nexcept MrropeError as error: print(error.fix)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=patched.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1", "pip install 'mrrope-gguf[lm-eval]'"]
    what, why, fix = done.stderr.splitlines()
    assert what == "error: this needs lm-evaluation-harness, which is not installed"
    assert why.startswith("  why: ")
    assert fix == "  fix: pip install 'mrrope-gguf[lm-eval]'"


def refused(path: Path, folder: Path, tmp_path: Path) -> list[str]:
    """What is said to tasks that cannot be run."""
    base = tiny.make(tmp_path / "base.gguf", extra={"tokenizer.chat_template": None})
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "roll.yaml").write_text((folder / "roll.yaml").read_text().replace("roll.jsonl", "no.jsonl"))
    said = []
    for file, tasks, how in (
        (path, ["choose", "nosuch", "nor this"], {"include_path": folder}),
        (path, [], {"include_path": folder}),
        (path, ["choose"], {"include_path": folder / "choose.yaml"}),
        (path, ["choose"], {"include_path": folder, "out": tmp_path / "file" / "x"}),
        (base, ["choose"], {"include_path": folder, "apply_chat_template": True}),
        (path, ["say"], {"include_path": folder, "gen_kwargs": "do_sample=True"}),
        (path, ["roll"], {"include_path": tmp_path / "bad"}),
    ):  # fmt: skip
        try:
            evaluate(file, tasks, include_defaults=False, **how)
        except MrropeError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_cannot_be_run(path: Path, folder: Path, tmp_path: Path, offline: dict[str, str]) -> None:
    said = patched.run(refused, path, folder, tmp_path, lib=None, env=offline)
    starts = [
        "Refused: unknown tasks: nosuch, nor this\n", "Refused: no task was named\n",
        f"FileTrouble: {folder / 'choose.yaml'}: no tasks in there\n",
        f"FileTrouble: {tmp_path / 'file' / 'x'}: no place for results\n",
        "Refused: base.gguf: there is no chat template", "Refused: m.gguf: the task asks for sampling",
        "MrropeError: lm-evaluation-harness stopped\n",
    ]  # fmt: skip
    assert [line[: len(start)] for line, start in zip(said, starts, strict=True)] == starts
    assert "FileNotFoundError" in said[-1]
