"""Runs a pass that asks: every question of a task in one way, beginnings that they share read once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from .. import engine
from . import trie
from .host import Host
from .meter import Meter
from .passes import Done, Emit, TaskPass, Tick
from .spec import Spec
from .tasks import Item, items, text_of


def run_task(
    host: Host, spec: Spec, task: TaskPass, emit: Emit, tick: Tick, done: Done, meter: Meter | None = None
) -> None:
    """Answer the questions whose cells are missing. `emit` gets each as soon as it is answered.

    meter: told of the first prompt, which nothing else shares time with.
    """
    keys = [key for key in task.keys if key not in done]
    if not keys:
        return
    llm = host.switch(spec.way(task.way), task.length)
    asked = [item for item in items(llm, spec, task) if task.key(item.length, item.sample) in set(keys)]
    prompts = [_prompt(llm, item, task) for item in asked]
    began, first = time.perf_counter(), [True]

    def finished(i: int, said: trie.Result) -> None:
        item = asked[i]
        text = text_of(llm, said.generated)
        found = item.result(task.task, task.way, said, text)
        emit(task.key(item.length, item.sample), {**found, "tokens": len(prompts[i].tokens)})

    def read(i: int, _: object) -> None:
        if meter and first:
            meter.add(0, len(prompts[i].tokens), time.perf_counter() - began)
            first.clear()

    # a GPU chooses its kernels by other sizes than a CPU, so there a shared beginning ends with a whole batch
    exact = any("CPU" not in device for device in engine.loaded_library().devices)
    trie.run(llm, prompts, on_result=finished, on_logits=read, progress=tick, exact=exact)


def _prompt(llm: Any, item: Item, task: TaskPass) -> trie.Prompt:
    """The question, or what truncation leaves of it: the last tokens that fit in the model's own context, BOS kept."""
    prompt = item.prompt
    room = task.window - max(prompt.n_ctx - len(prompt.tokens), prompt.generate)
    if task.way != "truncate" or len(prompt.tokens) <= room:
        return prompt
    tokens = prompt.tokens[-room:]
    if prompt.tokens[0] == llm.token_bos():
        tokens = (prompt.tokens[0], *tokens[1:])
    return replace(prompt, tokens=tokens)
