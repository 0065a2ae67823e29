"""Make texts that others wrote (names, answers, errors) fit for a page, a figure and a table."""

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
    """Return a text whose invisible characters are written out (``\\u202e``).

    Those are controls, changes of direction and halves of surrogate pairs.

    Args:
        text: anything.
        keep: such characters that stay.
    """
    characters = []
    for character in str(text):
        stays = _is_visible(character) or character in keep
        characters.append(character if stays else _escape_character(character))
    return "".join(characters)


def _is_visible(character: str) -> bool:
    return character == JOINER or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape_character(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def metric_words(name: str) -> str:
    """Return a metric's name for people, with spaces for underscores."""
    return printable_text(name).replace("_", " ")


def amount_text(value: float) -> str:
    """Return a number with four digits, large ones whole up to a million, then in powers of ten."""
    if math.isnan(value):
        return "–"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers with neighbours drawn together: ``0–2, 5``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    texts = [str(first) if not rest else f"{first}–{rest[-1]}" for first, *rest in ranges]
    return ", ".join(texts)


def seeds_text(numbers: Iterable[int]) -> str:
    """Return ``seed 3`` or ``seeds 0–4``."""
    seeds = set(numbers)
    return f"{plural_text(len(seeds), 'seed')} {number_ranges(seeds)}"


def count_text(number: int, thing: str) -> str:
    """Return ``1 run``, ``2 runs``."""
    return f"{number} {plural_text(number, thing)}"


def plural_text(number: int, thing: str) -> str:
    """Return ``run`` for one, ``runs`` for other numbers."""
    return thing if number == 1 else f"{thing}s"


def shorten(name: str, length: int = SHORT) -> str:
    """Return a name, if it is long only head and tail of it."""
    shown = printable_text(name)
    if len(shown) <= length:
        return shown
    tail = length // 3
    return f"{shown[: length - tail - 1]}…{shown[-tail:]}"


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Return short names for a figure, with a number if shortening made several the same."""
    labels: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = shorten(name)
        same = sum(label == short or label.startswith(f"{short} (") for label in labels.values())
        labels[name] = f"{short} ({same + 1})" if same else short
    return labels


def figure_text(text: str) -> str:
    """Return a text for matplotlib: a dollar sign is shown, and a leading underscore hides no label."""
    shown = printable_text(text, keep="\n").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
