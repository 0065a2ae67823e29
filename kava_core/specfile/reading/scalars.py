"""Read plain scalars by the core schema of YAML 1.2: ``1e-4`` is a number, ``yes`` and ``on`` are text."""

from __future__ import annotations

import re

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_LOOKS_OCTAL = re.compile(r"[-+]?0[0-7]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE_OR_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_NUMBER_LENGTH = 40

Scalar = str | int | float | bool | None


def parse_plain_scalar(text: str) -> Scalar:
    """Return the value of an unquoted scalar.

    Raises:
        ValueError: a number of more than 40 characters, or one that YAML 1.1 reads as octal.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    return _parse_number(text)


def _parse_number(text: str) -> Scalar:
    is_integer = _INTEGER.fullmatch(text) is not None
    has_prefix = _OCTAL_OR_HEX.fullmatch(text) is not None
    is_special = _INFINITE_OR_NAN.fullmatch(text) is not None
    if not (is_integer or has_prefix or is_special or _FLOAT.fullmatch(text)):
        return text
    if len(text) > _MAX_NUMBER_LENGTH:
        raise ValueError(f"a number has at most {_MAX_NUMBER_LENGTH} characters, not {len(text)}; quote text")
    if has_prefix:
        return int(text, 0)
    if is_integer:
        if _LOOKS_OCTAL.fullmatch(text) and int(text, 8) != int(text):
            raise ValueError(
                f"{text} is octal to some readers of YAML and decimal to others; leave out the leading "
                "zero, or quote text"
            )
        return int(text)
    # Python reads "inf" and "nan" without the point that YAML puts before them.
    return float(text.replace(".", "", 1) if is_special else text)
