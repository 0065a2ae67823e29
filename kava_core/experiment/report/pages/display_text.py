"""Texts that others wrote (names, answers, errors), made fit for a page, a figure and a table."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from typing import Any

SHORT = 36
"""Characters of a name in a figure."""

JOINER = "\u200d"
"""Makes one emoji of several: the one invisible character that is kept."""


def printable_text(text: Any, keep: str = "") -> str:
    """With everything that steers instead of being seen written out (``\\u202e``): controls, directions,
    halves of surrogate pairs.

    ``keep``: such characters that stay.
    """
    return "".join(one if _is_visible(one) or one in keep else _escape_character(one) for one in str(text))


def _is_visible(character: str) -> bool:
    return character == JOINER or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def metric_words(name: str) -> str:
    """A metric's name for people: spaces for underscores."""
    return printable_text(name).replace("_", " ")


def amount_text(value: float) -> str:
    """Four digits; large numbers whole up to a million, then in powers of ten."""
    if math.isnan(value):
        return "–"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def number_ranges(numbers: Iterable[int]) -> str:
    """``0–2, 5``: numbers with runs of them drawn together."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def seeds_text(numbers: Iterable[int]) -> str:
    """``seed 3`` or ``seeds 0–4``."""
    found = sorted(set(numbers))
    return f"{count_text(len(found), 'seed').split()[1]} {number_ranges(found)}"


def count_text(number: int, thing: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def shorten(name: str, length: int = SHORT) -> str:
    """Head and tail of a long name."""
    shown = printable_text(name)
    if len(shown) <= length:
        return shown
    tail = length // 3
    return f"{shown[: length - tail - 1]}…{shown[-tail:]}"


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Short names for a figure, told apart by a number where shortening made two the same."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = shorten(name)
        same = sum(one == short or one.startswith(f"{short} (") for one in found.values())
        found[name] = f"{short} ({same + 1})" if same else short
    return found


def figure_text(text: str) -> str:
    """For matplotlib: a dollar sign is a dollar sign, and a leading underscore hides no label."""
    shown = printable_text(text, keep="\n").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
