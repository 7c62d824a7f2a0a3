"""Chat templates are programs that come with a file: they run in Jinja's sandbox, and no longer than a limit.

The sandbox keeps a template away from Python's own objects, but lets it loop within loops, or make a text that no
memory holds. `Bounded` stops that; `bind` puts it in place of the sandbox that llama-cpp-python's formatters take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import Refused
from .text import printable

STEPS = 200_000  # turns of loops and calls, for one conversation
SECONDS = 10.0
ROOM = 1 << 30  # bytes that rendering may take
_LONGEST = 1 << 28  # characters or items that a multiplication may give
_BITS = 1 << 16  # of a power
KEY = "tokenizer.chat_template"


class _Template(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        environment: Bounded = self.environment  # type: ignore[assignment]
        environment.begin()
        with _little_memory():
            return super().render(*args, **kwargs)


class _Generator(CodeGenerator):
    """Computes nothing while it compiles: a constant may be as hostile as a loop."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an end: after STEPS or SECONDS a template is refused (SecurityError).

    Where nothing else runs in Python and the system knows such a limit (Linux), it also gets ROOM bytes at most.
    """

    template_class = _Template
    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "optimized": False})
        self.begin()

    def begin(self) -> None:
        """A conversation is rendered from here on."""
        self._left, self._until = STEPS, time.monotonic() + SECONDS

    def step(self) -> str:
        """Called wherever a template may go round. Raises SecurityError."""
        self._left -= 1
        if self._left < 0 or time.monotonic() > self._until:
            raise SecurityError(f"it does not end within {STEPS} steps or {SECONDS:g} s")
        return ""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.step()
        if _size(operator, left, right) > (_BITS if operator == "**" else _LONGEST):
            raise SecurityError(f"{operator} would give something too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        rounds: Iterator[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for node in list(rounds):
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno).set_environment(self))
        return tree


def _size(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that `left operator right` has, roughly; 0 where it is no matter."""
    if operator == "**":
        both = isinstance(left, int) and isinstance(right, int)
        return left.bit_length() * max(right, 0) if both else 0
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            return len(many) * max(times, 0)
    return 0


@contextmanager
def _little_memory() -> Iterator[None]:
    """ROOM more bytes for this process, for as long as it lasts; no limit where another thread might need more."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        yield
        return
    limits = [used + ROOM, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    if threading.active_count() > 1 or min(limits) != used + ROOM:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def bind(module: Any) -> None:
    """Let the chat formatters of the llama_cpp `module` run templates in Bounded."""
    module.llama_chat_format.ImmutableSandboxedEnvironment = Bounded


def check(text: str, name: str) -> None:
    """Raise Refused where the template `text` of the file `name` is no program: llama-cpp-python would not load it."""
    try:
        world = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        with _little_memory():
            world.from_string(text)
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        at = getattr(error, "lineno", None)
        where = f"line {at}: " if at else ""
        raise Refused(
            f"{name}: its chat template is broken",
            why=f"{where}{printable(str(error) or type(error).__name__, limit=300)} ({KEY}, a Jinja template)",
            fix="take the file from another source, or write one with a template that works: `gguf-new-metadata "
            "--chat-template-file FILE IN OUT` (pip install gguf)",
        ) from None


class _Generation(Extension):
    """{% generation %}, which Transformers' templates mark answers with; llama-cpp-python passes over it too."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
