"""What is found as an answer, and which answers are equal."""

from decimal import Decimal

import pytest

from kava_core.data.answers import extract_answer, is_right_answer, parse_number


@pytest.mark.parametrize(
    ("written", "expected"),
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
def test_extract(written, expected):
    assert extract_answer(written, "#### ") == expected


def test_extract_tolerates_white_space_that_a_tokenizer_lost():
    assert extract_answer("# 5", " #") == "5"
    assert extract_answer(" 0 0 5 #5", " #") == "5"


def test_extract_leaves_out_what_the_template_adds():
    assert extract_answer("[[3.5]] and", "[[", "]]") == "3.5]] and"
    assert extract_answer("[[3.5]]\nand", "[[", "]]") == "3.5"


NUMBERS = {
    "5": 5,
    "5.": 5,
    "5.0": 5,
    "5.00.": 5,
    "+5": 5,
    "-3": -3,
    "\N{MINUS SIGN}3": -3,
    ".5": "0.5",
    "-.5": "-0.5",
    "007": 7,
    "1,234": 1234,
    "1,234,567.80": "1234567.8",
    "12,345": 12345,
    "$1,234.": 1234,
    "-$3": -3,
    "$-3": -3,
    "€3": 3,
    "3 €": 3,
    "£3.50": "3.5",
    "50%": 50,
    "50 %": 50,
    "0.10000000000000000001": "0.10000000000000000001",
}
NO_NUMBERS = [
    *("", "-", ".", "$", "%", "1,2", "1,23", "12,34", "1234,567", "1,234,56", ",123", "1,,234", "1 234"),
    *("1/2", "1e3", "nan", "inf", "0x10", "5 apples", "5..", "--5", "-$-5", "5%%", "٥", "1.2.3", "1.5,000"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers(text, value):
    assert parse_number(text) == Decimal(value)
    assert parse_number(f"  {text}\n") == Decimal(value)


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("5", "5", True),
        ("5", "6", False),
        ("1,234", "1234", True),
        ("1,2", "12", False),
        ("1,2", "1,2", True),
        ("-$3", "-3", True),
        (".5", "0.50", True),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("1/2", "1/2", True),
        ("1/2", "0.5", False),
        ("2/4", "1/2", False),
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
def test_right(given, gold, right):
    assert is_right_answer(f"because\n#### {given}", gold, "#### ") is right
