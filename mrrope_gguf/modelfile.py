"""Ollama's Modelfile: where the model lies, its context, its turns in Go's template language, and where to stop.

Ollama gives a model a few thousand tokens unless it is told otherwise: hence num_ctx. It knows some chat templates by
itself and otherwise sends the bare question to the model, so TEMPLATE is written wherever the file's own is recognised
(see chat_template.py). Of the versions of its own llama graph that were read all took rope_freqs.weight, and none
`rope.scaling.attn_factor` or LongRoPE's factors.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from .chat_template import Recognised, recognise
from .errors import Refused
from .text import printable

if TYPE_CHECKING:
    from .export import Exported, Model


def ollama(model: Model, out: Path | None, force: bool) -> Exported:
    """The Modelfile as text, or written to the folder `out`. Raises Refused for a split model, FileTrouble."""
    from .export import Exported, memory_note

    _require_one_file(model)
    text, notes = modelfile(model)
    notes = [*notes, *filter(None, [memory_note(model)])]
    name = re.sub(r"[^a-z0-9._-]+", "-", model.path.stem.lower()).strip("-._") or "model"
    if out is None:
        return Exported(text.rstrip("\n"), (*notes, f"save it as Modelfile, then: ollama create {name} -f Modelfile"))
    from .hand_over import write_text

    path = write_text(out / "Modelfile", text, force=force)
    create = f"ollama create {name} -f {shlex.quote(str(path))}"
    return Exported(str(path), (*notes, f"then: {printable(create, limit=1000)}; ollama run {name}"))


def modelfile(model: Model) -> tuple[str, list[str]]:
    """The text, and what should be said about it; comments in the text say it too."""
    from .export import static_notes

    turns, why = _turns(model)
    notes = [*static_notes(model), *_doubts(model), why, "Ollama was not run by this project"]
    lines = [
        "# written by mrrope export",
        *(f"# {note}" for note in notes),
        f"FROM {model.path}",
        f"PARAMETER num_ctx {model.n_ctx}",
    ]
    for token in _stops(model, turns):
        lines.append(f'PARAMETER stop "{token}"')
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.format.go}"""')
        if turns.system and '"""' not in turns.system:
            lines.append(f'SYSTEM """{turns.system}"""')
    return "\n".join(lines) + "\n", notes


def _require_one_file(model: Model) -> None:
    if len(model.shards) > 1:
        fix = f"llama-gguf-split --merge {shlex.quote(str(model.path))} ONE.gguf, then export ONE.gguf"
        why = "Ollama takes a GGUF in one file, as far as is known here"
        raise Refused(
            f"{model.name}: the model is in {len(model.shards)} files", why=why, fix=printable(fix, limit=1000)
        )
    if not str(model.path).isprintable():
        why = "a Modelfile holds one line for the name of the file, and this one has characters that end or hide it"
        raise Refused(f"{model.name}: the path cannot be written down", why=why, fix="rename the file or its folder")


def _turns(model: Model) -> tuple[Recognised | None, str]:
    if model.template is None:
        return None, "the file has no chat template: it continues text, or Ollama guesses"
    try:
        found = recognise(model.template, model.tokens.get("bos", ""), model.tokens.get("eos", ""))
    except ImportError:
        return None, "without jinja2 the file's chat template could not be read: Ollama takes its own if it knows it"
    if found is None:
        unknown = "the file's chat template is none of those that are known here, so no TEMPLATE is written"
        return None, f"{unknown}: Ollama takes its own for it if it knows it, else the bare question"
    return found, f"TEMPLATE is the file's own ({found.format.name}), said again for Ollama"


def _doubts(model: Model) -> list[str]:
    if model.rendering == "long":
        return [
            "Ollama's own graphs that were read take no rope_factors_long: try it on a long text before you trust it"
        ]
    if model.rendering and model.attn_factor != 1.0:
        lost = f"take the factors but not the temperature (attn_factor {model.attn_factor:.4f})"
        return [f"Ollama's own llama graphs that were read {lost}: try it on a long text before you trust it"]
    return []


def _stops(model: Model, turns: Recognised | None) -> list[str]:
    """What ends an answer: the turn format's end, and the tokens by which the file says so."""
    tokens = [*(turns.format.stop if turns else ()), *(model.tokens.get(name, "") for name in ("eot", "eos", "eom"))]
    return [token for token in dict.fromkeys(tokens) if token.isprintable() and token.strip() and '"' not in token]
