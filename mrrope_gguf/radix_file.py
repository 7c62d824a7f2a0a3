"""Read a table of one's own from JSON: a radix array, factors, or the LongRoPE arrays of a Hugging Face config.json.

[1.0, 1.0, 1.1, ...]                                     radix
{"radix": [...], "lead": 1.0}                            radix, and factors[0] where it is not 1
{"factors": [...]}                                       what each theta_i is divided by
{"long_factor": [...], "short_factor": [...]}            LongRoPE; only the long array makes a table
{..., "rope_scaling": {"long_factor": [...]}}            a model's config.json
Beside the first three forms' arrays may stand "scale" and "attn_factor".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FileTrouble, MrropeError
from .tables import FLOAT32_MAX, factors_to_radix, radix_to_factors

_MOST = 16 << 20  # bytes: a table is some kilobytes
FORMS = 'a list of numbers, {"radix": [...]}, {"factors": [...]}, or a config.json with LongRoPE\'s "long_factor"'


@dataclass(frozen=True)
class RadixFile:
    """A custom table as a file states it; scale and attn_factor are None where it does not."""

    radix: tuple[float, ...]  # (n_rot/2,)
    lead: float  # factors[0]
    scale: float | None
    attn_factor: float | None


def read_radix(path: str | Path, n_pairs: int | None = None) -> RadixFile:
    """The table in a JSON file, in any of the forms above.

    n_pairs: n_rot/2 of the model it is for, if known; the file must then hold that many numbers.
    Raises FileTrouble if the file cannot be read, and MrropeError, with the fix, for JSON that holds no table, a wrong
    number of values, or a value that is not a finite number above 0.
    """
    path = Path(path)
    document = _load(path)
    if isinstance(document, list):
        document = {"radix": document}
    if not isinstance(document, dict):
        raise _no_table(path, f"it holds {_kind(document)}")
    nested = _longrope(document)
    if nested is not None:
        return _from_longrope(path, document, nested, n_pairs)
    held = [name for name in ("radix", "factors") if name in document]
    if len(held) != 1:
        raise _no_table(path, "it has both radix and factors" if held else "it has neither radix nor factors")
    values = _numbers(path, held[0], document[held[0]], n_pairs)
    lead = _number(path, "lead", document["lead"]) if "lead" in document else 1.0
    factors = _factors(path, values, lead) if held[0] == "radix" else values
    attn = _number(path, "attn_factor", document["attn_factor"]) if document.get("attn_factor") is not None else None
    return RadixFile(tuple(factors_to_radix(factors)), factors[0], _scale(path, document.get("scale")), attn)


def _load(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, and a device may never end
            raise OSError("it is no regular file")
        if (size := path.stat().st_size) > _MOST:
            raise OSError(f"it has {size} bytes, and a table has at most {_MOST}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        name = path.name or path
        raise FileTrouble(f"{name}: cannot be read", why=str(error), fix="--radix takes a JSON file") from None
    except UnicodeDecodeError as error:
        raise _no_table(path, f"it is not text: {error}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MrropeError(f"{path.name}: is not JSON", why=str(error), fix=f"write {FORMS}") from None


def _longrope(document: dict[str, Any]) -> dict[str, Any] | None:
    """The object that holds long_factor: the document, its rope_scaling (or rope_parameters), or text_config's."""
    for outer in (document, document.get("text_config")):
        if not isinstance(outer, dict):
            continue
        for inner in (outer, outer.get("rope_scaling"), outer.get("rope_parameters")):
            if isinstance(inner, dict) and "long_factor" in inner:
                return inner
    return None


def _from_longrope(path: Path, document: dict[str, Any], rope: dict[str, Any], n_pairs: int | None) -> RadixFile:
    """LongRoPE's long array; scale and temperature by its own rules (arXiv 2402.13753; transformers' config keys)."""
    factors = _numbers(path, "long_factor", rope["long_factor"], n_pairs)
    text = document.get("text_config")
    outer = {**(text if isinstance(text, dict) else {}), **document, **rope}
    target, original = outer.get("max_position_embeddings"), outer.get("original_max_position_embeddings")
    scale = _scale(path, outer.get("factor"))
    if original is not None:
        original = _number(path, "original_max_position_embeddings", original)
        if target is not None:
            scale = _scale(path, _number(path, "max_position_embeddings", target) / original)
    attn = rope.get("attention_factor", rope.get("long_mscale"))
    if attn is not None:
        attn = _number(path, "attention_factor", attn)
    elif scale is not None and original is not None and original > 1.0:
        attn = math.sqrt(1.0 + math.log(scale) / math.log(original))
    return RadixFile(tuple(factors_to_radix(factors)), factors[0], scale, attn)


def _numbers(path: Path, name: str, values: object, n_pairs: int | None) -> list[float]:
    if not isinstance(values, list) or not values:
        raise _no_table(path, f"{name} is {_kind(values)}, not a list of numbers")
    if n_pairs is not None and len(values) != n_pairs:
        raise MrropeError(
            f"{path.name}: {name} has {len(values)} numbers, the model has {n_pairs} rotary pairs",
            why="there must be one number for each rotary pair, n_rot/2 of them",
            fix=f"give {n_pairs} numbers, or use the table that was made for this model",
        )
    return [_number(path, f"{name}[{i}]", value) for i, value in enumerate(values)]


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= FLOAT32_MAX:
        return float(value)
    raise MrropeError(
        f"{path.name}: {name} is {_kind(value)}",
        why="it must be a finite number above 0",
        fix="write the factor itself: 1 leaves a pair as it was, larger numbers slow it down",
    )


def _scale(path: Path, value: object) -> float | None:
    if value is None:
        return None
    scale = _number(path, "scale", value)
    if scale < 1.0:
        raise MrropeError(
            f"{path.name}: scale is {scale:g}",
            why="a table stretches the context, so its scale is 1 or more",
            fix="write the new context divided by the original one, or leave scale out and pass --scale",
        )
    return scale


def _factors(path: Path, radix: list[float], lead: float) -> list[float]:
    try:
        factors = radix_to_factors(radix, lead)
    except ValueError as error:
        raise _no_table(path, str(error)) from None
    if max(factors) > FLOAT32_MAX or min(factors) < 1.0 / FLOAT32_MAX:
        raise _no_table(path, f"its radix multiplies to factors from {min(factors):.3g} to {max(factors):.3g}")
    return factors


def _no_table(path: Path, why: str) -> MrropeError:
    return MrropeError(f"{path.name}: holds no rope table", why=why, fix=f"write {FORMS}")


def _kind(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
