"""Rendering an example and judging a written answer."""

import pytest
from pydantic import ValidationError

from kava_core.data.chain import chain_examples
from kava_core.data.examples import (
    Example,
    drop_last_step,
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
    assert text.prompt_part.text == "7+3*2-5?"
    assert [text.text[slice(*own)] for own in text.from_data] == ["7+3*2-5", " 0 0 5", "5"]


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


def test_no_marker_in_the_template():
    with pytest.raises(
        SpecError, match=r"^data\.template\.answer: ' \{answer\}' has no marker before \{answer\}"
    ):
        is_correct("5", Example("q", "r", "5"), Template(answer=" {answer}"))


def test_without_marker_nothing_is_correct():
    assert not is_correct("5", Example("q", "r", "5"), GSM)
