"""The format of PAL's arithmetic files, SVAMP and MultiArith among them (arXiv 2211.10435). No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from kava_core.data.examples import Example, read_text_field
from kava_core.errors import SpecError


def example_from_pal(record: Mapping[str, Any], where: str, *, separator: str = "\n") -> Example:
    """``input`` is the question, ``target`` a number; there is no reasoning.

    Whole numbers lose their ``.0``. SpecError, opening with ``where``, for anything else.
    """
    question, target = read_text_field(record, "input", where), record.get("target")
    try:
        number = Decimal(str(target)) if not isinstance(target, bool) else None
    except InvalidOperation:
        number = None
    if number is None or not number.is_finite():
        raise SpecError(f"{where}: field 'target' must be a number, not {target!r}")
    whole = number.to_integral_value()
    return Example(question, "", str(whole) if whole == number else f"{number.normalize():f}", task="pal")
