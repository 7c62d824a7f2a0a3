"""All attacks, by name and in the order of the table."""

from __future__ import annotations

from tests.attacks import cost_cases, header_cases, long_cases, model_cases, split_cases, table_cases, vocab_cases
from tests.attacks.case import Attack

GROUPS = {
    "header": "Malformed headers",
    "long": "Headers that are as long as they say",
    "model": "Sound files that lie about their model",
    "vocabulary": "Vocabularies that lie",
    "table": "Extended files that lie about themselves",
    "split": "Split models",
}
CASES: dict[str, Attack] = {}
for _module in (header_cases, long_cases, model_cases, vocab_cases, table_cases, cost_cases, split_cases):
    assert not CASES.keys() & _module.CASES.keys()
    CASES |= _module.CASES
