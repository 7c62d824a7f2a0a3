"""Chat templates of a file's author's making: broken ones are an error of ours, hostile ones come to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2 import TemplateError

from mrrope_gguf import chat_jinja
from mrrope_gguf.chat_template import rendered
from mrrope_gguf.errors import Refused
from mrrope_gguf.session import ChatSession
from tests import tiny
from tests.session_chat import GREEDY, open_small, small

QUESTION = [{"role": "user", "content": "one"}]
BROKEN = [
    ("{% for m in messages %}{{ m['content'] }}", "line 1: Unexpected end of template"),
    ("a\n{{ 1 + }}", "line 2: "),
    ("{% nonsense %}", "unknown tag 'nonsense'"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
    ("{% for a in b %}" * 40 + "{% endfor %}" * 40, "nested blocks"),
    ("{{ \x1b[2J }}", "unexpected char"),
]
ROUND = "{% for i in range(100000) %}"
ENDLESS = [
    ROUND * 3 + "{% endfor %}" * 3,
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% for m in [messages] recursive %}{{ loop([m, m]) }}{{ loop([m, m]) }}{% endfor %}",
    ROUND + "{% set x = range(100000) | map('string') | join | length %}{% endfor %}",
]
HUGE = [
    "{{ 'a' * 10000000000 }}",
    "{% if 'a' * 10000000000 %}a{% endif %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ [0] * 10000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{% if 9 ** 999999999 %}a{% endif %}",
]
GREEDY_FILTERS = ["{{ 'a' | center(30000000000) }}", "{{ 'a'.ljust(30000000000) }}", "{{ '%30000000000d' % 1 }}"]
NOSY = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.engine
@pytest.mark.parametrize(("template", "why"), BROKEN)
def test_a_broken_template_is_one_clear_error(tmp_path: Path, template: str, why: str) -> None:
    path = small(tmp_path, extra={"tokenizer.chat_template": template})
    with pytest.raises(Refused, match="its chat template is broken") as caught:
        open_small(path)
    assert why in caught.value.why, caught.value.why
    assert "\x1b" not in str(caught.value)
    assert "gguf-new-metadata" in caught.value.fix


@pytest.mark.engine
def test_a_broken_template_beside_a_sound_one(tmp_path: Path) -> None:
    named = {"tokenizer.chat_template": tiny.CHAT_TEMPLATE, "tokenizer.chat_template.tools": "{% if %}"}
    with pytest.raises(Refused, match="its chat template is broken"):
        open_small(small(tmp_path, extra=named))


@pytest.mark.engine
def test_chat_ends_with_three_lines(tmp_path: Path) -> None:
    path = small(tmp_path, extra={"tokenizer.chat_template": "{% for %}"})
    command = [sys.executable, "-m", "mrrope_gguf", "chat", str(path), "-p", "a", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert [line.split(":")[0] for line in error] == ["error", "  why", "  fix"]


@pytest.mark.engine
@pytest.mark.parametrize("template", [ENDLESS[0], HUGE[0], NOSY[0]])
def test_a_hostile_template_gives_plain_lines(tmp_path: Path, template: str) -> None:
    began, notes = time.monotonic(), list[str]()
    llm = open_small(small(tmp_path, extra={"tokenizer.chat_template": template}))
    session = ChatSession(llm, store=False, on_note=notes.append, **GREEDY)
    assert "the file's chat template does not work" in notes[0]
    session.ask("one")
    # llama-cpp-python's own way is as safe
    with pytest.raises(TemplateError):
        llm.create_chat_completion(messages=QUESTION, max_tokens=1)
    llm.close()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("template", [*ENDLESS, *HUGE, *NOSY])
def test_it_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_jinja, "SECONDS", 2.0)
    began = time.monotonic()
    assert not rendered(template, QUESTION)  # what is missing, as __globals__ is, may also be written as nothing
    assert time.monotonic() - began < 20


def alone(code: str) -> None:
    """Run `code` in a process of its own: this one has threads that other tests left."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


LITTLE_MEMORY = """
import resource
from mrrope_gguf.chat_jinja import Bounded

before = resource.getrlimit(resource.RLIMIT_AS)
try:
    Bounded().from_string({template!r}).render()
except MemoryError:
    assert resource.getrlimit(resource.RLIMIT_AS) == before
else:
    raise AssertionError("rendered")
"""

BESIDE_A_THREAD = """
import resource, sys, threading
from mrrope_gguf.chat_jinja import Bounded

seen = []

def look():
    seen.append(resource.getrlimit(resource.RLIMIT_AS))
    return ""

def render():
    Bounded().from_string("{{ look() }}").render(look=look)

render()
thread = threading.Thread(target=render)
thread.start()
thread.join()
assert seen[1] == resource.getrlimit(resource.RLIMIT_AS)
assert (seen[0] != seen[1]) == sys.platform.startswith("linux")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no limit of memory elsewhere")
@pytest.mark.parametrize("template", GREEDY_FILTERS)
def test_a_filter_gets_so_much_memory(template: str) -> None:
    alone(LITTLE_MEMORY.format(template=template))


@pytest.mark.skipif(os.name != "posix", reason="no limit of memory elsewhere")
def test_the_limit_of_memory_leaves_other_threads_alone() -> None:
    alone(BESIDE_A_THREAD)


ORDINARY: list[tuple[str, Callable[[str], bool]]] = [
    (tiny.CHAT_TEMPLATE, lambda text: text == "user: one\nassistant:"),
    ("{% generation %}a{% endgeneration %}", lambda text: text == "a"),
    ("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ [1] * 2 }}", lambda text: text == "---102412[1, 1]"),
    ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}b", lambda text: text == "b"),
    ("{% macro f(x) %}<{{ caller(x) }}>{% endmacro %}{% call(a) f(1) %}{{ a }}{% endcall %}", lambda t: t == "<1>"),
    ("{{ {'a': [1, 2]} | tojson(indent=1) }}", lambda text: text == '{\n "a": [\n  1,\n  2\n ]\n}'),
    ("{% set s = namespace(n=0) %}{% for i in range(1000) %}{% set s.n = s.n + i %}{% endfor %}{{ s.n }}",
     lambda text: text == "499500"),
]  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize(("template", "right"), ORDINARY)
def test_ordinary_templates_are_what_they_were(template: str, right: Callable[[str], bool]) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    from mrrope_gguf import engine

    chat_jinja.bind(engine.llama_cpp())
    chat_jinja.check(template, "m.gguf")
    text = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")(messages=QUESTION).prompt
    assert right(text), text


def test_a_long_conversation_is_no_endless_one() -> None:
    messages = [{"role": "user", "content": "a" * 1000}] * 20000
    text = rendered(tiny.CHAT_TEMPLATE, messages)
    assert text is not None
    assert len(text) > 20_000_000
