"""Chat templates of a file's author's making: broken ones are an error of ours, hostile ones come to nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from jinja2 import TemplateError

from mrrope_gguf import chat_jinja
from mrrope_gguf.chat_template import rendered
from mrrope_gguf.errors import Refused
from mrrope_gguf.session import ChatSession
from tests import tiny
from tests.costly_templates import COSTLY
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
    *COSTLY,
]
HUGE = [
    "{{ 'a' * 10000000000 }}",
    "{% if 'a' * 10000000000 %}a{% endif %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ [0] * 10000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{% if 9 ** 999999999 %}a{% endif %}",
]
PILES = [  # nothing of it too large by itself
    "{% set a = 'a' * 60000000 %}{{ [" + "a.upper(), " * 30 + "] | length }}",
    "{% set a = 'a' * 60000000 %}{{ [" + "a ~ 'b', " * 30 + "] | length }}",
    "{{ [" + "[0] * 1000000, " * 200 + "] | length }}",
]
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
    monkeypatch.setattr(chat_jinja, "_alarm", nullcontext)  # other threads and systems have none
    began = time.process_time()
    assert not rendered(template, QUESTION)  # what is missing, as __globals__ is, may also be written as nothing
    assert time.process_time() - began < 5


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
@pytest.mark.parametrize("template", PILES)
def test_a_template_gets_so_much_memory(template: str) -> None:
    alone(LITTLE_MEMORY.format(template=template))


@pytest.mark.skipif(os.name != "posix", reason="no limit of memory elsewhere")
def test_the_limit_of_memory_leaves_other_threads_alone() -> None:
    alone(BESIDE_A_THREAD)


def hang() -> str:
    """A C call that goes on for years, and looks for signals as it goes."""
    return str(re.match("(a+)+b", "a" * 60))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on this system")
def test_an_alarm_ends_what_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_jinja, "SECONDS", 0.1)
    before, began = signal.getsignal(signal.SIGALRM), time.process_time()
    with pytest.raises(TemplateError, match="does not end"):
        chat_jinja.Bounded().from_string("{{ hang() }}").render(hang=hang)
    assert time.process_time() - began < 5
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (before, (0.0, 0.0))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on this system")
def test_an_alarm_of_others_is_left_alone() -> None:
    seen: list[object] = []

    def look() -> str:
        seen.append(signal.getsignal(signal.SIGALRM))
        return ""

    def render() -> None:
        chat_jinja.Bounded().from_string("{{ look() }}").render(look=look)

    theirs = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGALRM, theirs)
    try:
        render()
        assert seen.pop() != theirs
        signal.setitimer(signal.ITIMER_REAL, 100)
        render()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
        signal.setitimer(signal.ITIMER_REAL, 0)
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
        assert seen == [theirs, theirs]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_template_of_no_sane_length_is_not_compiled() -> None:
    """Quadratic: names that are set, times branches."""
    text = "".join(f"{{% set a{i} = 1 %}}" for i in range(10000)) + "{% if a %}{% endif %}" * 10000
    began = time.process_time()
    with pytest.raises(Refused, match="is broken") as caught:
        chat_jinja.check(text, "m.gguf")
    assert "at most 65536" in caught.value.why
    with pytest.raises(Refused, match="templates are too long") as caught:
        chat_jinja.check_all(["a" * 60000] * 3, "m.gguf")
    assert "180000 characters, at most 131072" in caught.value.why
    chat_jinja.check_all(["a" * 60000] * 2, "m.gguf")
    assert time.process_time() - began < 2


def test_a_filter_that_is_left_out_matters_only_where_it_is_reached() -> None:
    assert rendered("{% if false %}{{ 'a' | urlize }}{% endif %}b", QUESTION) == "b"
    assert rendered("{{ 'a' | urlize }}b", QUESTION) is None


ORDINARY: list[tuple[str, Callable[[str], bool]]] = [
    (tiny.CHAT_TEMPLATE, lambda text: text == "user: one\nassistant:"),
    ("{% generation %}a{% endgeneration %}", lambda text: text == "a"),
    ("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ [1] * 2 }}", lambda text: text == "---102412[1, 1]"),
    ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}b", lambda text: text == "b"),
    ("{% macro f(x) %}<{{ caller(x) }}>{% endmacro %}{% call(a) f(1) %}{{ a }}{% endcall %}", lambda t: t == "<1>"),
    ("{{ {'a': [1, 2]} | tojson(indent=1) }}", lambda text: text == '{\n "a": [\n  1,\n  2\n ]\n}'),
    ("{{ 'a,b'.split(',') }}{{ 'a b c'.split(maxsplit=1) }}{{ 'xay'.strip('x').rstrip('y') }}{{ 'a' in 'ab' }}",
     lambda text: text == "['a', 'b']['a', 'b c']aTrue"),
    ("{{ '%s: %3d' % ('a', 7) }}{{ '{}-{b:>3}'.format('a', b=1) }}{{ '%s!' | format('a') }}",
     lambda text: text == "a:   7a-  1a!"),
    ("{{ [3, 1, 2] | sort | join('-') }}{{ [1, 2] | sum }}{{ [{'a': 1}] | map(attribute='a') | list }}{{ 1 < 2 < 3 }}",
     lambda text: text == "1-2-33[1]True"),
    ("{{ {'b': 1, 'a': 2} | dictsort }}{{ {('a', 'b'): 1}[('a', 'b')] }}{{ 'ab'[::-1] }}{{ 2 not in [1] }}",
     lambda text: text == "[('a', 2), ('b', 1)]1baTrue"),
    ("{% for i in range(9) if i is even %}{{ loop.index }}{{ i }},{% endfor %}", lambda t: t == "10,22,34,46,58,"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\nb' | indent(2) | trim | upper }}",
     lambda text: text == "1A\n  B"),
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
