"""Plain scalars as in the core schema of YAML 1.2: ``1e-4`` is a number, ``yes`` and ``on`` are text."""

from __future__ import annotations

import re

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_NUMBER_LENGTH = 40

Scalar = str | int | float | bool | None


def parse_plain_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar; ValueError for a number of more than 40 characters."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    return _parse_number(text)


def _parse_number(text: str) -> Scalar:
    integer, prefixed = _INTEGER.fullmatch(text), _OCTAL_OR_HEX.fullmatch(text)
    if not (integer or prefixed or _FLOAT.fullmatch(text) or _SPECIAL.fullmatch(text)):
        return text
    if len(text) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has at most {_MAX_NUMBER_LENGTH} characters, not {len(text)}; quote text")
    if prefixed:
        return int(text, 0)
    return int(text) if integer else float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
