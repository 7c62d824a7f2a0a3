"""What an answer is worth, from 0 to 1, by the rules of RULER, InfiniteBench and LongBench v2.

Each function takes what the model said and the references, and needs nothing but the two strings; `rouge` alone needs
a package, rouge-score. `METRICS` names them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import EngineTrouble

References = Sequence[str]
# InfiniteBench's own list of signs, which has a 》 and no 《
_SIGNS = ((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64), (0x3001, 0x3003),
          (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0x2013, 0x2014), (0x2018, 0x2019),
          (0x201B, 0x201F), (0x2026, 0x2027), (0xFE4F, 0xFE4F))  # fmt: skip
_NO_SIGNS = str.maketrans("", "", string.punctuation + "".join(chr(c) for a, b in _SIGNS for c in range(a, b + 1)))


def string_match_all(said: str, references: References) -> float:
    """RULER: the share of references that occur in the answer, capitals or not.

    >>> string_match_all("They are 12 and AB", ["12", "ab", "7", "9"])
    0.5
    """
    return sum(reference.lower() in said.lower() for reference in references) / len(references)


def string_match_part(said: str, references: References) -> float:
    """RULER's questions: 1 if any reference occurs in the answer, capitals or not."""
    return float(any(reference.lower() in said.lower() for reference in references))


def first_integer(said: str, references: References) -> float:
    """InfiniteBench's PassKey and Number: the first run of digits is the reference.

    >>> first_integer("71432.", ["71432"]), first_integer("It is 7 or 71432", ["71432"])
    (1.0, 0.0)
    """
    found = re.search("[0-9]+", said)
    return float(found is not None and found[0] == references[0])


def any_word(said: str, references: References) -> float:
    """InfiniteBench's KV: the reference is one of the words between punctuation."""
    return float(references[0] in _words(said))


def any_name(said: str, references: References) -> float:
    """InfiniteBench's dialogue: the character's name is among the words, capitals or not. The first one counts."""
    return float(references[0].upper() in [word.upper() for word in _words(said)])


def first_number(said: str, references: References) -> float:
    """InfiniteBench's Math.Find: the first number, sign not read, equals the reference."""
    found = re.search(r"[0-9]+(\.[0-9]+)?", said)
    return float(found is not None and float(found[0]) == float(references[0]))


def last_integer(said: str, references: References) -> float:
    """InfiniteBench's Code.Run: the last word is the reference, as integers."""
    words = re.sub("[\n.`'\":]", " ", said).split()
    try:
        return float(bool(words) and int(words[-1]) == int(references[0]))
    except ValueError:
        return 0.0


def running_integers(said: str, references: References) -> float:
    """InfiniteBench's Math.Calc: the share of the references, in order, that came before the first mistake."""
    right = 0
    for found, wanted in zip(re.findall("[0-9]+", said), references, strict=False):
        if int(found) != int(wanted):
            break
        right += 1
    return right / len(references)


def option(said: str, references: References) -> float:
    """InfiniteBench's choice among four: references are the right option's text and its letter.

    The letter stands first, or after `answer is:` and the like, or is the first of A, B, C and D standing alone.

    >>> [option(said, ["Tom", "B"]) for said in ("B. Tom", "The answer is: Tom", "It is C, not B")]
    [1.0, 1.0, 0.0]
    """
    if said[:1] in tuple("ABCD"):
        return float(said[0] in references)
    plain = " ".join(re.sub("[\n\"'.,?!{}]", " ", said).split(" "))
    plain = re.sub(" {2,}", " ", plain)
    after = _after(plain, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(tuple(references)))
    alone = [word for word in plain.split() if word in ("A", "B", "C", "D")]
    return float(bool(alone) and alone[0] in references)


def bug_option(said: str, references: References) -> float:
    """InfiniteBench's Code.Debug: references are the faulty function's name and its letter."""
    name, letter = references
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    plain = re.sub("[\n`'\"*-]|[Oo]ption", " ", said.strip())
    after = _after(re.sub(" {2,}", " ", plain), ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith((letter, name)))


def choice(said: str, references: References) -> float:
    """LongBench v2: the letter in `The correct answer is (B)`, brackets or not, asterisks taken out.

    >>> choice("**The correct answer is (B)**.", ["B"]), choice("B", ["B"])
    (1.0, 0.0)
    """
    said = said.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(r"The correct answer is ([A-D])", said)
    return float(found is not None and found[1] == references[0])


def letter(said: str, references: References) -> float:
    """A letter right after the answer prefix, `(B)` or `B`: for base models, which do not keep to a form.

    >>> letter(" B) because", ["B"]), letter("Because", ["B"])
    (1.0, 0.0)
    """
    found = re.match(r"\s*\(?([A-D])\b", said)
    return float(found is not None and found[1] == references[0])


def f1(said: str, references: References) -> float:
    """InfiniteBench's questions on books: F1 of the words, the best over the references."""
    return max(_f1(_normal(said), _normal(reference)) for reference in references)


def f1_chinese(said: str, references: References) -> float:
    """InfiniteBench's questions on Chinese books: F1 of the characters, signs and spaces left out, the best.

    >>> f1_chinese("是老 张了。", ["老张", "李"]), f1_chinese("李", ["老张"])
    (0.6666666666666666, 0.0)
    """
    plain = [list("".join(text.lower().translate(_NO_SIGNS).split())) for text in (said, *references)]
    return max(_f1(plain[0], reference) for reference in plain[1:])


def rouge(said: str, references: References) -> float:
    """InfiniteBench's summaries: F of ROUGE-Lsum, words not stemmed, the best over the references.

    Raises EngineTrouble where the package that counts it is not installed.
    """
    lcs = require_rouge()(["rougeLsum"], use_stemmer=False)
    return float(max(lcs.score(reference, said)["rougeLsum"].fmeasure for reference in references))


def require_rouge() -> Any:
    """rouge-score's scorer class. Raises EngineTrouble without the package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EngineTrouble(
            "longbook_sum_eng: no score",
            why=f"summaries are scored by the package rouge-score, which cannot be loaded: {error}",
            fix="pip install 'mrrope-gguf[eval]', or leave this task out",
        ) from None
    return RougeScorer


def rouge1_recall(said: str, reference: str) -> float:
    """ROUGE-1 recall, as the MrRoPE paper scores needles: the share of the reference's words that occur in the answer.

    >>> rouge1_recall("it is 12 34.", "12 56")
    0.5
    """
    words = Counter(re.findall(r"\w+", reference.lower()))
    return sum((words & Counter(re.findall(r"\w+", said.lower()))).values()) / max(sum(words.values()), 1)


METRICS: dict[str, Callable[[str, References], float]] = {
    each.__name__: each
    for each in (
        string_match_all, string_match_part, first_integer, any_word, any_name, first_number, last_integer,
        running_integers, option, bug_option, choice, letter, f1, f1_chinese, rouge,
    )
}  # fmt: skip


def _words(said: str) -> list[str]:
    return re.sub("[\n:\"'.,?!{}]", " ", said).split()


def _after(said: str, openings: Sequence[str]) -> str | None:
    """What follows the first of `openings`, by their order, that occurs, and one character behind it."""
    for opening in openings:
        if opening in said:
            return said[said.index(opening) + len(opening) + 1 :]
    return None


def _normal(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], reference: list[str]) -> float:
    same = sum((Counter(said) & Counter(reference)).values())
    return 2 * same / (len(said) + len(reference)) if same else 0.0
