"""Read the format of PAL's arithmetic files, such as SVAMP and MultiArith (arXiv 2211.10435). No torch
here."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from kava_core.data.examples import Example, read_text_field
from kava_core.errors import SpecError


def example_from_pal(record: Mapping[str, Any], where: str, *, separator: str = "\n") -> Example:
    """Return the example in a record: ``input`` is the question, ``target`` a number; there is no reasoning.

    Whole numbers lose their ``.0``. ``separator`` is not used, because there are no steps.

    Raises:
        SpecError: there is no question, or the target is no finite number.
    """
    question = read_text_field(record, "input", where)
    number = _parse_target(record.get("target"))
    if number is None:
        raise SpecError(f"{where}: field 'target' must be a number, not {record.get('target')!r}")
    whole = number.to_integral_value()
    answer = str(whole) if whole == number else f"{number.normalize():f}"
    return Example(question, "", answer, task="pal")


def _parse_target(target: Any) -> Decimal | None:
    """Return the target as a finite number; None if it is none."""
    if isinstance(target, bool):
        return None
    try:
        number = Decimal(str(target))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
