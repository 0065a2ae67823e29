"""pydantic's findings in plain words: what is wrong, what is possible, what was probably meant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from kava_core.errors import did_you_mean, one_of
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.reading.source_map import SpecPath
from kava_core.specfile.sections.compare import Name
from kava_core.specfile.walk import TypeAtLocation, accepted_keys, follow_location, literal_values, union_tags


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a document."""

    path: SpecPath
    """Where, from the root."""
    message: str
    """What."""
    at_key: bool
    """Whether the key is wrong, not its value."""
    missing: bool
    """Whether the path is not in the document."""


def explain_errors(error: ValidationError, model: type[BaseModel], registry: Registry) -> list[Finding]:
    """Every finding, in the order of the spec's fields; alternatives of a union become one."""
    details = [(detail, follow_location(model, detail["loc"])) for detail in error.errors(include_url=False)]
    spots = [spot for _, spot in details]
    kept = [(detail, spot) for detail, spot in details if not _is_overshadowed(detail, spot, spots)]
    groups: dict[tuple[SpecPath, bool], list[tuple[ErrorDetail, TypeAtLocation]]] = defaultdict(list)
    for detail, spot in kept:
        groups[spot.path, spot.is_key].append((detail, spot))
    return [_make_finding(path, group, registry) for (path, _), group in groups.items()]


def quote_value(value: Any) -> str:
    """A value as an error message quotes it: short, and in the words of YAML."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


ErrorDetail = Any
"""pydantic's description of one error: type, loc, input, ctx."""


def _is_overshadowed(detail: ErrorDetail, spot: TypeAtLocation, spots: Sequence[TypeAtLocation]) -> bool:
    """A finding deeper inside tells more than the failure of an alternative, or of the list around it."""
    deeper = any(
        len(other.path) > len(spot.path) and other.path[: len(spot.path)] == spot.path for other in spots
    )
    return deeper and (spot.alternative or detail["type"] == "too_short")


def _make_finding(
    path: SpecPath, details: Sequence[tuple[ErrorDetail, TypeAtLocation]], registry: Registry
) -> Finding:
    detail, spot = details[0]
    missing = detail["type"] == "missing"
    at_key = detail["type"] == "extra_forbidden" or spot.is_key
    if detail["type"] == "union_tag_invalid" and isinstance(detail["input"], dict):
        path = (*path, "name")
    return Finding(path, _describe_errors(details, registry), at_key, missing)


def _describe_errors(details: Sequence[tuple[ErrorDetail, TypeAtLocation]], registry: Registry) -> str:
    """Expectations of alternatives joined by ``or``; anything else as its own sentence."""
    detail, spot = details[0]
    expected = list(dict.fromkeys(filter(None, (_expected_value(*one) for one in details))))
    if len(details) > 1 and expected:
        return f"must be {' or '.join(expected)}, not {quote_value(detail['input'])}"
    sentence = _SENTENCES.get(detail["type"])
    if sentence:
        return sentence(detail, spot, registry)
    if expected:
        return f"must be {expected[0]}, not {quote_value(detail['input'])}"
    return str(detail["msg"]).replace("Input should", "must", 1)


def _unknown_key(detail: ErrorDetail, spot: TypeAtLocation, registry: Registry) -> str:
    possible = accepted_keys(spot.parent)
    return f"unknown key; possible: {', '.join(possible)}{did_you_mean(str(spot.path[-1]), possible)}"


def _unknown_word(detail: ErrorDetail, spot: TypeAtLocation, registry: Registry) -> str:
    given, possible = detail["input"], literal_values(spot.expected)
    if spot.is_key:
        given = spot.path[-1]
        possible = [word.strip("' ") for word in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
    told = f"{quote_value(given)} is not possible; possible: {', '.join(possible)}"
    return told + did_you_mean(str(given), possible)


def _unknown_tag(detail: ErrorDetail, spot: TypeAtLocation, registry: Registry) -> str:
    given, kind, possible = detail["input"], _component_kind(spot.path), union_tags(spot.expected)
    given = given["name"] if isinstance(given, dict) else given
    if not isinstance(given, str):
        return f"must be text, not {quote_value(given)}; possible: {one_of(possible)}"
    if kind in KINDS:
        return registry.unknown(kind, given)
    return f"no {kind} {given!r}; possible: {one_of(possible)}{did_you_mean(given, possible)}"


def _missing_tag(detail: ErrorDetail, spot: TypeAtLocation, registry: Registry) -> str:
    possible = one_of(union_tags(spot.expected))
    if isinstance(detail["input"], dict):
        return f"needs a 'name'; possible: {possible}"
    return (
        f"must be a name or a mapping with a name, not {quote_value(detail['input'])}; possible: {possible}"
    )


def _component_kind(path: SpecPath) -> str:
    """The kind of component a path holds, or its last key."""
    words = [part for part in path if isinstance(part, str)]
    return "kv_loss" if words[-1] == "losses" else words[-1]


def _words_of_validator(detail: ErrorDetail, spot: TypeAtLocation, registry: Registry) -> str:
    return str(detail["ctx"]["error"])


_Sentence = Callable[[ErrorDetail, TypeAtLocation, Registry], str]

_SENTENCES: dict[str, _Sentence] = {
    "missing": lambda detail, spot, registry: "is missing",
    "extra_forbidden": _unknown_key,
    "literal_error": _unknown_word,
    "union_tag_invalid": _unknown_tag,
    "union_tag_not_found": _missing_tag,
    "too_short": lambda detail, spot, registry: f"needs at least {detail['ctx']['min_length']} entry",
    "value_error": _words_of_validator,
    "assertion_error": _words_of_validator,
}

_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
}

_BOUNDS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
}

_NAME_PATTERN = Name.__metadata__[0].pattern  # type: ignore[attr-defined]


def _expected_value(detail: ErrorDetail, spot: TypeAtLocation) -> str | None:
    """What the value must be, to stand after ``must be``."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        numbers = {key: _bound_text(value) for key, value in context.items()}
        return _BOUNDS[kind].format(**numbers)
    if kind == "literal_error":
        return " or ".join(map(repr, literal_values(spot.expected))) or None
    if kind == "string_pattern_mismatch":
        return _describe_pattern(context["pattern"])
    return _TYPES.get(kind)


def _describe_pattern(pattern: str) -> str:
    if pattern == _NAME_PATTERN:
        return "letters, digits, '_', '.' and '-', starting with a letter or digit"
    return f"text matching {pattern}"


def _bound_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
