"""What lm-evaluation-harness is told of a model's vocabulary: BOS, pieces, stop strings, the file's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.errors import Refused
from mrrope_gguf.evals.lm_eval import MrropeLM
from mrrope_gguf.evals.lm_eval_text import Until
from tests import tiny

pytestmark = pytest.mark.engine

PLAIN: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("lm_eval") / "m.gguf")


@pytest.fixture(scope="module")
def lm(path: Path) -> Iterator[MrropeLM]:
    with MrropeLM(path, **PLAIN) as model:
        yield model


def test_bos_is_never_doubled(path: Path, lm: MrropeLM) -> None:
    assert lm.tok_encode("the")[0] == 1
    assert lm.tok_encode("<s>the") == [1, *lm.tok_encode("the", add_special_tokens=False)]
    assert lm.tok_encode("<s>", add_special_tokens=False) == [1]
    assert lm.tok_encode("a</s>")[-1] == 2
    assert lm.tok_decode(lm.tok_encode("the hill", add_special_tokens=False)) == " the hill"
    with MrropeLM(path, add_bos_token=False, **PLAIN) as without:
        assert without.tok_encode("the") == lm.tok_encode("the", add_special_tokens=False)


def test_chat_template(lm: MrropeLM) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is "}]
    assert lm.apply_chat_template(talk[:1]) == "user: hi\nassistant:"
    # the last message is to be gone on with: what the template puts after it is left out
    with MrropeLM(lm.llm) as taken:
        each = "[{{ m.content | trim }}]{{ eos_token }}"
        taken.vocabulary.template = "{{ bos_token }}{% for m in messages %}" + each + "{% endfor %}"
        assert taken.apply_chat_template(talk, add_generation_prompt=False) == "<s>[hi]</s>[The answer is"
        assert taken.tok_encode(taken.apply_chat_template(talk)).count(1) == 1
    assert lm.chat_template(True) == lm.chat_template("default") == tiny.CHAT_TEMPLATE
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name.startswith("m.gguf-")


def test_a_template_may_refuse_system_messages(lm: MrropeLM) -> None:
    with MrropeLM(lm.llm) as taken:
        refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        taken.vocabulary.template = f"{refusal}{{{{ messages[0].content }}}}"
        talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        assert taken.apply_chat_template(talk) == "u"
        with pytest.raises(Refused, match="ValueError: no system"):
            taken.apply_chat_template(talk[:1])
        assert taken.tokenizer_name != lm.tokenizer_name


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 'a' }}"]
)
def test_bad_templates_are_errors(lm: MrropeLM, template: str) -> None:
    with MrropeLM(lm.llm) as taken:
        taken.vocabulary.template = template
        with pytest.raises(Refused, match="its chat template could not be applied"):
            taken.apply_chat_template([{"role": "user", "content": "u"}])


def test_no_template(tmp_path: Path) -> None:
    with MrropeLM(tiny.make(tmp_path / "base.gguf", extra={"tokenizer.chat_template": None}), **PLAIN) as lm:
        said = r"base\.gguf: there is no chat template to apply"
        with pytest.raises(Refused, match=said):
            lm.chat_template(True)
        with pytest.raises(Refused, match=said):
            lm.apply_chat_template([{"role": "user", "content": "u"}])
        assert lm.tokenizer_name


def test_stop_strings_may_lie_across_tokens(lm: MrropeLM) -> None:
    """Bytes of a character, a word over several tokens, a control token's name; each text starts anew."""
    for text, stops, wanted in (
        ("on the \u20ac in", ["\u20ac"], "on the \u20ac"),
        ("an otto by", ["zz", "tto"], "an otto"),
        ("in</s>on", ["</s>"], "in"),
        ("in", ["", "zz"], "in"),
    ):
        tokens = lm.tok_encode(text, add_special_tokens=False)
        for until in (Until(lm.vocabulary, stops),) * 2:
            ends = [n for n in range(1, len(tokens) + 1) if until(tokens[:n])]
            said = tokens[: ends[0]] if ends else tokens
            assert lm.tok_decode(said).strip() == wanted
        assert bool(ends) == (wanted != "in" or "</s>" in text)


@pytest.mark.real
def test_pieces_of_any_length(smollm2: Path) -> None:
    """llama_cpp's own detokenize has 32 bytes for a token; the longest of this vocabulary has more."""
    with MrropeLM(smollm2, 256, **PLAIN) as lm:
        text = " " * 40 + "x" + "=" * 64 + "\n"
        tokens = lm.tok_encode(text, add_special_tokens=False)
        assert max(len(lm.vocabulary.piece(token)) for token in tokens) > 32
        assert lm.tok_decode(tokens) == text
