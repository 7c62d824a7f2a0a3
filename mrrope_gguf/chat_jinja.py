"""Chat templates are programs that come with a file: they run in Jinja's sandbox, and no longer than a limit.

The sandbox keeps a template away from Python's own objects, but lets it loop within loops, or make a text that no
memory holds. `Bounded` stops that; `bind` puts it in place of the sandbox that llama-cpp-python's formatters take.
"""

from __future__ import annotations

import operator
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import chat_costs as costs
from .chat_filters import FILTERS, TESTS, Guarded
from .errors import Refused
from .text import printable

STEPS = 200_000  # turns of loops and calls, for one conversation
SECONDS = 10.0
ROOM = 1 << 30  # bytes that rendering may take
SOURCE = 1 << 16  # characters of a template, of which the longest known has 17,000; jinja2 compiles in quadratic time
KEY = "tokenizer.chat_template"
_COMPARED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip
_JINJA = {"_loop_vars", "_block_vars"}  # which the compiler hands to every call
_OWN = (Macro, BlockReference, LoopContext)  # what they do is counted inside


class _Template(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        environment: Bounded = self.environment  # type: ignore[assignment]
        environment.begin()
        with _little_memory(), _alarm():
            return super().render(*args, **kwargs)


class _Generator(CodeGenerator):
    """Computes nothing while it compiles: a constant may be as hostile as a loop.

    What Python does by itself (comparisons, texts made of values, keys of dictionaries) is handed to Bounded.
    """

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_pre(node, frame, finalize)
        self.write("environment.light(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")
        super()._output_child_post(node, frame, finalize)

    def _light(self, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.light(")
        self.visit(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if len(node.ops) != 1:
            self.write("(")
            self._light(node.expr, frame)
            for op in node.ops:
                self.visit(op, frame)
            self.write(")")
            return
        self.write(f"environment.compared({node.ops[0].op!r}, ")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        self.write(f" {operators[node.op]} ")
        self._light(node.expr, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        kind = "str_join"
        if frame.eval_ctx.volatile:
            kind = "(markup_join if context.eval_ctx.volatile else str_join)"
        elif frame.eval_ctx.autoescape:
            kind = "markup_join"
        self.write(f"{kind}(")
        self._light(nodes.Tuple(node.nodes, "load"), frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("{")
        for pair in node.items:
            self._light(pair.key, frame)
            self.write(": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("}")


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an end: after STEPS or SECONDS a template is refused (SecurityError).

    Nor may one operation take long or give too much (chat_costs); it has the filters, tests and methods that chat
    templates use. Where nothing else runs in Python and the system knows such a limit (Linux), it also gets ROOM bytes
    at most; in the main thread of a POSIX system, an alarm ends what all this lets pass.
    """

    template_class = _Template
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "optimized": False})
        self.begin()
        self.filters: Any = Guarded(self.filters, FILTERS, self.tick)
        self.tests: Any = Guarded(self.tests, TESTS, self.tick)
        del self.globals["lipsum"]

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        """As jinja2's. SecurityError for a template of more than SOURCE characters."""
        if isinstance(source, str) and len(source) > SOURCE:
            raise SecurityError(f"it has {len(source)} characters, at most {SOURCE}")
        with _alarm():
            return super().from_string(source, *args, **kwargs)

    def begin(self) -> None:
        """A conversation is rendered from here on."""
        self._left, self._until = STEPS, time.monotonic() + SECONDS

    def step(self) -> bool:
        """Called wherever a template may go round. Raises SecurityError."""
        self._left -= 1
        if self._left < 0:
            raise _endless()
        self.tick()
        return True

    def tick(self) -> None:
        """Called before each operation. Raises SecurityError once the time is over."""
        if time.monotonic() > self._until:
            raise _endless()

    def light(self, value: Any) -> Any:
        """The value, if it is no too large one to be text, to be compared or to be a key."""
        self.tick()
        costs.weigh(value)
        return value

    def compared(self, op: str, left: Any, right: Any) -> Any:
        self.tick()
        costs.comparison(op, left, right)
        return _COMPARED[op](left, right)  # type: ignore[no-untyped-call]  # two of them are lambdas

    def concat(self, parts: Iterable[str]) -> str:
        """The parts as one text, of TEXT characters at most."""
        out, room = list[str](), costs.TEXT
        for part in parts:
            room -= len(part)
            if room < 0:
                costs.too_much("the text")
            out.append(part)
        return "".join(out)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.step()
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, list, tuple, dict)):
            args = costs.method(owner, name, args, {key: kwargs[key] for key in kwargs.keys() - _JINJA})
        elif not isinstance(__obj, _OWN):
            costs.weigh(args, {key: kwargs[key] for key in kwargs.keys() - _JINJA})
            if name == "strftime_now" and any(len(str(one)) > costs.SHORT for one in args):
                costs.too_much("a format")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        costs.operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            self.light(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and costs.attribute(obj, attr)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        rounds: Iterator[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for node in list(rounds):
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test)  # which is asked in turns that the body has no part in
            else:
                node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno).set_environment(self))
        return tree


def _endless() -> SecurityError:
    return SecurityError(f"it does not end within {STEPS} steps or {SECONDS:g} s")


@contextmanager
def _alarm() -> Iterator[None]:
    """An end to C code that goes on without end, where signals can do it and nobody else uses that one."""
    mine = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not mine or signal.getitimer(signal.ITIMER_REAL)[0] or signal.getsignal(signal.SIGALRM) is None:
        yield
        return

    def end(*_: Any) -> None:
        raise _endless()

    before = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS + 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


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


def check_all(texts: Sequence[str], name: str) -> None:
    """`check` for all templates of the file `name`; Refused also where they are too long together."""
    if sum(map(len, texts)) > 2 * SOURCE:
        raise Refused(
            f"{name}: its chat templates are too long",
            why=f"{len(texts)} of them have {sum(map(len, texts))} characters, at most {2 * SOURCE}; they are compiled "
            "when the file is opened",
            fix="take the file from another source",
        )
    for text in texts:
        check(text, name)


class _Generation(Extension):
    """{% generation %}, which Transformers' templates mark answers with; llama-cpp-python passes over it too."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
