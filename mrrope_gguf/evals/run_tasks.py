"""Runs a pass that asks: every question of a task in one way, beginnings that they share read once."""

from __future__ import annotations

import time

from .. import engine
from ..meter import Meter, Span
from . import trie
from .host import Host
from .passes import Done, Emit, TaskPass, Tick
from .spec import Spec
from .tasks import items, shown, text_of


def run_task(
    host: Host, spec: Spec, task: TaskPass, emit: Emit, tick: Tick, done: Done, meter: Meter | None = None
) -> None:
    """Answer the questions whose cells are missing. `emit` gets each as soon as it is answered.

    meter: told of the first prompt, which nothing else shares time with, and of every answer.
    """
    left = {key for key in task.keys if key not in done}
    if not left:
        return
    llm = host.switch(spec.way(task.way), task.length)
    asked = [item for item in items(llm, spec, task) if task.key(item.length, item.sample) in left]
    prompts = [shown(llm, item, task) for item in asked]
    began, first = [time.perf_counter()], [True]

    def finished(i: int, said: trie.Result) -> None:
        item, n = asked[i], len(prompts[i].tokens)
        if meter and len(said.generated) > 1:
            meter.add(Span(n, len(said.generated) - 1, single=True), time.perf_counter() - began[0])
        text = text_of(llm, said.generated)
        found = item.result(task.task, task.way, said, text)
        emit(task.key(item.length, item.sample), {**found, "tokens": n})

    def read(i: int, _: object) -> None:
        now = time.perf_counter()
        if meter and first:
            meter.add(Span(0, len(prompts[i].tokens)), now - began[0])
            first.clear()
        began[0] = now

    # a GPU chooses its kernels by other sizes than a CPU, so there a shared beginning ends with a whole batch
    exact = any("CPU" not in device for device in engine.loaded_library().devices)
    trie.run(llm, prompts, on_result=finished, on_logits=read, progress=tick, exact=exact)
