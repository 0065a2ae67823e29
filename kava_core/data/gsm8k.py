"""GSM8K's own format (https://github.com/openai/grade-school-math, arXiv 2110.14168). No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kava_core.data.examples import Example, text_of
from kava_core.errors import SpecError

_CALCULATION = re.compile(r"<<.*?>>")


def from_gsm8k(record: Mapping[str, Any], where: str) -> Example:
    """``question`` and ``answer`` = rationale, a line ``#### number``; ``<<…>>`` marks and commas removed.

    SpecError, opening with ``where``, for a missing field and an answer without ``####``.
    """
    question, solution = text_of(record, "question", where), text_of(record, "answer", where)
    rationale, marker, number = solution.rpartition("####")
    answer = number.strip().replace(",", "")
    if not marker or not answer:
        raise SpecError(f"{where}: 'answer' must end in a line '#### number', not {_tail(solution)!r}")
    return Example(question, _CALCULATION.sub("", rationale).removesuffix("\n"), answer, task="gsm8k")


def _tail(text: str, width: int = 30) -> str:
    return text if len(text) <= width else "…" + text[-width:]
