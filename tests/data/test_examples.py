"""Rendering an example and judging a written answer."""

import pytest
from pydantic import ValidationError

from kava_core.data.chain import chain_examples
from kava_core.data.examples import (
    Example,
    drop_last_step,
    extract_answer,
    is_correct,
    render_example,
    split_steps,
)
from kava_core.errors import SpecError
from kava_core.specfile.sections.data import ChainData, Template

GSM = Template()
CHAIN = ChainData().template


def test_text_and_bounds():
    text = render_example(Example("7+3*2-5", " 0 0 5", "5"), CHAIN)
    assert text.text == "7+3*2-5? 0 0 5 #5"
    assert text.bounds == (0, 8, 14, 17)
    assert text.prompt == "7+3*2-5?"


def test_only_the_own_braces_are_filled():
    template = Template(prompt='{"q": {prompt}}', reasoning="{reasoning}", answer="{{answer}}#{0}")
    text = render_example(Example("{answer} {x}", "{prompt}", "{", task="t"), template)
    assert text.text == '{"q": {answer} {x}}' + "{prompt}" + "{{}#{0}"


@pytest.mark.parametrize(
    ("reasoning", "separator", "steps", "kept"),
    [
        ("a\nb c\nd", "\n", ["a", "b c", "d"], "a\nb c"),
        (" 0 0 5", " ", ["0", "0", "5"], " 0 0"),
        (" 5", " ", ["5"], ""),
        ("a\n\nb\n \n", "\n", ["a", "b"], "a"),
        ("<<1+1=2>><<2+1=3>>", "><", ["<<1+1=2>", "<2+1=3>>"], "<<1+1=2>"),
        ("5 5 5", " ", ["5", "5", "5"], "5 5"),
        ("alone", "\n", ["alone"], ""),
        ("", "\n", [], ""),
        ("\n \n", "\n", [], ""),
    ],
)
def test_steps_and_the_last_of_them(reasoning, separator, steps, kept):
    example = Example("p", reasoning, "a", "t", ("other\nwords",))
    assert split_steps(reasoning, separator) == steps
    without = drop_last_step(example, separator)
    assert without == Example("p", kept, "a", "t", ("other\nwords",))
    assert split_steps(without.reasoning, separator) == steps[:-1]


def test_the_steps_of_chains():
    """One for each operation: the results modulo 7, the last of them the answer."""
    data = ChainData(steps=3, modulus=7, operations="+-", train=20, validation=5)
    for example in chain_examples(data)[0]:
        results = [str(eval(example.prompt[: 2 * place + 3]) % 7) for place in range(3)]
        assert split_steps(example.reasoning, data.separator) == results
        assert drop_last_step(example, data.separator).reasoning == f" {results[0]} {results[1]}"


def test_the_separator_of_chains_is_fixed():
    with pytest.raises(ValidationError, match="separator\n  Extra inputs are not permitted"):
        ChainData.model_validate({"separator": "\n"})


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("so 4\n#### 4", "4"),
        ("#### 4\nQuestion: next\n#### 9", "4"),
        ("####4 ", "4"),
        ("#### \n 12", "12"),
        ("the answer is 4", None),
        ("####", ""),
        ("", None),
    ],
)
def test_extract(generated, expected):
    assert extract_answer(generated, GSM) == expected


def test_extract_tolerates_white_space_that_a_tokenizer_lost():
    assert extract_answer("# 5", CHAIN) == "5"
    assert extract_answer(" 0 0 5 #5", CHAIN) == "5"


def test_extract_leaves_out_what_the_template_adds():
    assert extract_answer("[[3.5]] and", Template(answer="[[{answer}]]")) == "3.5]] and"
    assert extract_answer("[[3.5]]\nand", Template(answer="[[{answer}]]")) == "3.5"


def test_no_marker_in_the_template():
    with pytest.raises(
        SpecError, match=r"^data\.template\.answer: ' \{answer\}' has no marker before \{answer\}"
    ):
        extract_answer("5", Template(answer=" {answer}"))


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("5", "5", True),
        ("5", "6", False),
        ("1,234", "1234", True),
        ("$1,234.", "1234", True),
        ("-$3", "-3", True),
        ("5.0", "5", True),
        (".5", "0.50", True),
        ("5.", "5", True),
        ("+5", "5", True),
        ("5 apples", "5", False),
        ("nan", "NaN", False),
        ("1e3", "1000", False),
        ("0.1", "0.10000000000000000001", False),
        ("Paris", "Paris", True),
        ("paris", "Paris", False),
        ("a\nb", "a\nb", True),
        ("a\nb", "a", True),
        ("", "0", False),
    ],
)
def test_correct(given, gold, right):
    assert is_correct(f"because\n#### {given}", Example("q", "r", gold), GSM) is right


def test_without_marker_nothing_is_correct():
    assert not is_correct("5", Example("q", "r", "5"), GSM)
