"""A file's chat template, rendered and recognised: which of the common turn formats it is, if any.

A file's template is a Jinja program. Ollama's are Go templates, so a file's own has to be said again in those; that is
done only where both give the same text for whole conversations, a default system message included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]

_MARK = "\N{SNOWMAN}\N{COMET}"  # stands for the default system message while it is looked for
_ASKED = {"role": "user", "content": "How deep is the sea?"}
_ANSWERED = {"role": "assistant", "content": "Deep."}
_AGAIN = {"role": "user", "content": "How deep,\nin metres?"}


@dataclass(frozen=True)
class TurnFormat:
    """How turns are written: `render` gives the text up to where the answer starts, `go` is the same for Ollama."""

    name: str
    render: Callable[[Sequence[Message]], str]
    go: str
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Recognised:
    """A file's template is this format; `system` is the system message it puts where a conversation has none."""

    format: TurnFormat
    system: str


def _chatml(messages: Sequence[Message]) -> str:
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def _llama3(messages: Sequence[Message]) -> str:
    turns = (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages)
    return "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def _gemma(messages: Sequence[Message]) -> str:
    out, system = "", ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
            continue
        role = "model" if m["role"] == "assistant" else "user"
        out += f"<start_of_turn>{role}\n{system}{m['content']}<end_of_turn>\n"
        system = ""
    return out + "<start_of_turn>model\n"


def _tagged(end: str) -> Callable[[Sequence[Message]], str]:
    def render(messages: Sequence[Message]) -> str:
        return "".join(f"<|{m['role']}|>\n{m['content']}{end}\n" for m in messages) + "<|assistant|>\n"

    return render


_TAGGED_GO = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}END\n{{ end }}<|assistant|>\n"
FORMATS = (
    TurnFormat(
        "chatml",
        _chatml,
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ("<|im_end|>",),
    ),
    TurnFormat(
        "llama3",
        _llama3,
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
    ),
    TurnFormat(
        "gemma",
        _gemma,
        '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}'
        '{{ else }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
        '{{ $system }}{{ .Content }}<end_of_turn>\n{{ $system = "" }}{{ end }}{{ end }}<start_of_turn>model\n',
        ("<end_of_turn>",),
    ),
    TurnFormat("phi3", _tagged("<|end|>"), _TAGGED_GO.replace("END", "<|end|>"), ("<|end|>",)),
    TurnFormat("zephyr", _tagged("</s>"), _TAGGED_GO.replace("END", "</s>"), ("</s>",)),
)


def recognise(template: str, bos: str = "", eos: str = "") -> Recognised | None:
    """The format of a Jinja chat template, proved on conversations with and without a system message, or None.

    A template that refuses a system message is asked without one. bos, eos: the file's tokens as text. A beginning of
    text that the template writes is left out: engines put it there by themselves.
    Raises ImportError without jinja2.
    """
    if any(known.render([_ASKED]).startswith(bos) for known in FORMATS):
        bos = ""  # a turn's own mark, as SmolLM2 has it
    several = [_ASKED, _ANSWERED, _AGAIN]
    system = {"role": "system", "content": "Be brief."}
    texts = [rendered(template, messages, bos, eos) for messages in ([system, *several], several, [_ASKED])]
    if texts[1] is None or texts[2] is None:
        return None
    for known in FORMATS:
        if texts[0] not in (None, known.render([system, *several])):
            continue
        default = _default_system(known, texts[2])
        if default is None:
            continue
        first = [{"role": "system", "content": default}] if default else []
        if texts[1] == known.render([*first, *several]):
            return Recognised(known, default)
    return None


def rendered(template: str, messages: Sequence[Message], bos: str = "", eos: str = "") -> str | None:
    """What a Jinja chat template makes of `messages`, up to the answer and without `bos`; None where it fails.

    It runs in Jinja's sandbox, and not for ever. Raises ImportError without jinja2.
    """
    import jinja2

    from .chat_jinja import Bounded

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    world = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        text = world.from_string(template).render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=True,
            bos_token="",  # a token of a vocabulary  # nosec B106
            eos_token=eos,
            raise_exception=refuse,
            strftime_now=lambda _: "",  # a template that dates its text equals no format
        )
    except Exception:  # a template is a program of others: it may raise anything
        return None
    return text.removeprefix(bos)


def _default_system(known: TurnFormat, text: str) -> str | None:
    """The system message in `text`, a question alone as a template wrote it; None if it is not of this format."""
    if text == known.render([_ASKED]):
        return ""
    before, _, after = known.render([{"role": "system", "content": _MARK}, _ASKED]).partition(_MARK)
    if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
        return text[len(before) : len(text) - len(after)]
    return None
