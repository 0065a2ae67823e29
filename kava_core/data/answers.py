"""Find the answer in a written text, and judge whether it is the right one.

Nothing but the standard library is used: ``kava eval --lm-eval`` copies this file beside the task it writes,
so that lm-evaluation-harness judges by the same rules.
"""

from __future__ import annotations

import re
from decimal import Decimal

_CURRENCY = "[$€£¥]"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?){_CURRENCY}?(?P<sign_behind_currency>[-+]?)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?:[ ]?(?:%|{_CURRENCY}))?\.?"
)
_MINUS = "\N{MINUS SIGN}"


def extract_answer(written: str, marker: str, behind: str = "", lines: int = 1) -> str | None:
    """Return what follows the first marker, up to the end of the line, without white space around it.

    Args:
        written: the text, special tokens included.
        marker: text before an answer; white space around it is ignored, because many tokenizers do not give
            that back.
        behind: text that the template has after an answer, which is dropped.
        lines: lines of the answer.

    Returns:
        The answer; None if the marker is missing.
    """
    _, found, rest = written.partition(marker.strip())
    if not found:
        return None
    kept = "\n".join(rest.strip().splitlines()[:lines])
    return kept.strip().removesuffix(behind.strip()).strip()


def parse_number(text: str) -> Decimal | None:
    """Return the number that a text is, exactly; None if it is none.

    A number may have a sign (the Unicode minus as well), a currency sign, thousands commas where each is
    followed by three digits, no digit before the decimal point, a percent sign, and a period at its end. A
    fraction such as ``1/2`` is a text.
    """
    match = _NUMBER.fullmatch(text.strip().replace(_MINUS, "-"))
    if match is None or (match["sign"] and match["sign_behind_currency"]):
        return None
    return Decimal(match["sign"] + match["sign_behind_currency"] + match["digits"].replace(",", ""))


def is_same_answer(given: str, right: str) -> bool:
    """Return whether two answers are the same text or the same number.

    Numbers are compared without what they may be written with, as is usual for GSM8K (arXiv 2110.14168):
    see ``parse_number``.
    """
    given, right = given.strip(), right.strip()
    if given == right:
        return True
    number = parse_number(given)
    return number is not None and number == parse_number(right)


def is_right_answer(written: str, right: str, marker: str, behind: str = "") -> bool:
    """Return whether a written text holds the right answer behind its marker.

    Args:
        written: the text, special tokens included.
        right: the answer that is expected; as many lines are compared as it has.
        marker: as in ``extract_answer``.
        behind: as in ``extract_answer``.
    """
    given = extract_answer(written, marker, behind, lines=max(1, len(right.strip().splitlines())))
    return given is not None and is_same_answer(given, right)
