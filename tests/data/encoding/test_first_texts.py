"""What is told, and refused, of the first texts before anything is trained on them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import normalizers, processors

from kava_core.data.encoding.first_texts import notices_on_texts
from kava_core.data.examples import Example
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import Template
from tests.data.encoding.test_answer_judge import letters

GSM = Template()
PLAIN = [Example("1+1?", "so", "2")] * 3


def told(tokenizer: Any, examples: list[Example], template: Template = GSM) -> list[str]:
    return notices_on_texts(tokenizer, examples, template, who="student")


def test_nothing_is_told_of_plain_texts() -> None:
    assert told(letters(), PLAIN) == []


def test_the_share_of_unknown_tokens() -> None:
    """``Ωb?`` and a new line, ``so`` and one, and ``#### 2``: 2 unknown tokens in 3 texts of 13."""
    examples = [Example("Ωb?", "so", "2"), Example("Ωb?", "so", "2"), Example("bbb", "so", "2")]
    line = "student: its tokenizer does not know everything in the data: 0.051 of the tokens, "
    assert pytest.approx(0.051, abs=5e-4) == 2 / 39
    assert told(letters(), examples) == [f"{line}in 2 of the first 3 examples, are '<unk>'"]


def test_special_tokens_in_the_data() -> None:
    examples = [*PLAIN, Example("1<eos>1?", "so", "2")]
    assert told(letters(), examples) == [
        "student: the data's own text holds special tokens of its tokenizer, such as '<eos>', in 1 of 4 "
        "examples; they are read as text"
    ]


def test_special_tokens_of_the_template_are_meant() -> None:
    assert told(letters(), PLAIN, Template(answer="#### {answer}<eos>")) == []


def test_dropped_characters() -> None:
    tokenizer = letters(normalizers.Replace("+", ""))
    assert told(tokenizer, [*PLAIN, Example("2?", "so", "2")]) == [
        "student: its tokenizer drops characters, such as '+', in 3 of the first 4 examples"
    ]


def test_a_template_that_doubles_the_start_is_refused() -> None:
    tokenizer = letters(special=("<bos>",))
    number = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", number)]
    )
    assert told(tokenizer, PLAIN) == []
    with pytest.raises(SpecError, match=r"^student: its texts would begin with '<bos>' twice: .* drop it"):
        told(tokenizer, PLAIN, Template(prompt="<bos>{prompt}\n"))
