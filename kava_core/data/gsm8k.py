"""Read GSM8K's own format (https://github.com/openai/grade-school-math, arXiv 2110.14168). No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kava_core.data.examples import Example, join_steps, read_text_field, shorten_to_end
from kava_core.errors import SpecError

_CALCULATION = re.compile(r"<<.*?>>")


def example_from_gsm8k(
    record: Mapping[str, Any], where: str, *, separator: str = "\n", equations: bool = False
) -> Example:
    """Return the example in a record with ``question`` and ``answer``: a rationale and a line ``####
    number``.

    The number loses its commas. A rationale may have no calculation ``<<…>>``: 95 of GSM8K's 7,473 training
    examples and 18 of its 1,319 test examples.

    Args:
        record: the fields by key.
        where: names the record in errors, such as ``file:line``.
        separator: text between two steps.
        equations: whether the steps are the calculations alone, ``<<48/2=24>>`` each; otherwise they are the
            rationale's lines, without them.

    Raises:
        SpecError: a field is missing, the answer has no ``####``, or a step contains the separator.
    """
    question = read_text_field(record, "question", where)
    solution = read_text_field(record, "answer", where)
    rationale, marker, number = solution.rpartition("####")
    answer = number.strip().replace(",", "")
    if not marker or not answer:
        raise SpecError(
            f"{where}: 'answer' must end in a line '#### number', not {shorten_to_end(solution)!r}"
        )
    steps = _CALCULATION.findall(rationale) if equations else _lines_without_calculations(rationale)
    return Example(question, join_steps(steps, separator, where), answer, task="gsm8k")


def _lines_without_calculations(rationale: str) -> list[str]:
    return _CALCULATION.sub("", rationale).removesuffix("\n").split("\n")
