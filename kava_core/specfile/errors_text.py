"""Explain pydantic's errors in plain words: what is wrong, what is possible, what was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from kava_core.errors import did_you_mean, one_of
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.reading.source_map import SpecPath
from kava_core.specfile.sections.compare import Name
from kava_core.specfile.walk import (
    TypeAtLocation,
    accepted_keys,
    follow_location,
    literal_values,
    union_tags,
)

ErrorDetail = Any
"""pydantic's description of one error: a mapping with type, loc, input and ctx."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a document."""

    path: SpecPath
    """Where, from the root."""
    message: str
    """What is wrong, in words."""
    at_key: bool
    """Whether the key is wrong, not its value."""
    missing: bool
    """Whether the path is not in the document."""


MOST_FINDINGS = 200
"""Errors of pydantic that are explained; to explain one takes long, and nobody reads more."""


def explain_errors(error: ValidationError, model: type[BaseModel], registry: Registry) -> list[Finding]:
    """Return what is wrong, in the order of the spec's fields; of very many errors the first.

    pydantic reports every alternative of a union by itself; here they become one finding.
    """
    details = error.errors(include_url=False)[:MOST_FINDINGS]
    types = [follow_location(model, detail["loc"]) for detail in details]
    groups: dict[tuple[SpecPath, bool], list[tuple[ErrorDetail, TypeAtLocation]]] = {}
    for detail, here in zip(details, types, strict=True):
        if not _is_overshadowed(detail, here, types):
            groups.setdefault((here.path, here.is_key), []).append((detail, here))
    return [_make_finding(path, group, registry) for (path, _), group in groups.items()]


def quote_value(value: Any) -> str:
    """Return a value as an error message quotes it: short, and in the words of YAML."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_overshadowed(detail: ErrorDetail, here: TypeAtLocation, types: Sequence[TypeAtLocation]) -> bool:
    """Return whether an error deeper inside explains more than this one.

    This one is then the failure of an alternative, or of the list around the deeper error.
    """
    if not (here.alternative or detail["type"] == "too_short"):
        return False
    depth = len(here.path)
    return any(len(other.path) > depth and other.path[:depth] == here.path for other in types)


def _make_finding(
    path: SpecPath, details: Sequence[tuple[ErrorDetail, TypeAtLocation]], registry: Registry
) -> Finding:
    detail, here = details[0]
    missing = detail["type"] == "missing"
    at_key = detail["type"] == "extra_forbidden" or here.is_key
    if detail["type"] == "union_tag_invalid" and isinstance(detail["input"], dict):
        path = (*path, "name")
    return Finding(path, _describe_errors(details, registry), at_key, missing)


def _describe_errors(details: Sequence[tuple[ErrorDetail, TypeAtLocation]], registry: Registry) -> str:
    """Join what the alternatives expect by ``or``; describe anything else in a sentence of its own."""
    expectations = [_expected_value(detail, here) for detail, here in details]
    expected = list(dict.fromkeys(filter(None, expectations)))
    detail, here = details[0]
    if len(details) > 1 and expected:
        return f"must be {' or '.join(expected)}, not {quote_value(detail['input'])}"
    describe = _SENTENCES.get(detail["type"])
    if describe is not None:
        return describe(detail, here, registry)
    if expected:
        return f"must be {expected[0]}, not {quote_value(detail['input'])}"
    return str(detail["msg"]).replace("Input should", "must", 1)


def _unknown_key(detail: ErrorDetail, here: TypeAtLocation, registry: Registry) -> str:
    possible = accepted_keys(here.parent)
    suggestion = did_you_mean(str(here.path[-1]), possible)
    return f"unknown key; possible: {', '.join(possible)}{suggestion}"


def _unknown_word(detail: ErrorDetail, here: TypeAtLocation, registry: Registry) -> str:
    if here.is_key:
        given = here.path[-1]
        possible = _quoted_words(detail["ctx"]["expected"])
    else:
        given = detail["input"]
        possible = literal_values(here.expected)
    suggestion = did_you_mean(str(given), possible)
    return f"{quote_value(given)} is not possible; possible: {', '.join(possible)}{suggestion}"


def _quoted_words(text: str) -> list[str]:
    """Return the words of pydantic's list ``'a', 'b' or 'c'``."""
    return [word.strip("' ") for word in text.replace(" or ", ",").split(",")]


def _unknown_tag(detail: ErrorDetail, here: TypeAtLocation, registry: Registry) -> str:
    given = detail["input"]
    if isinstance(given, dict):
        given = given["name"]
    kind, possible = _component_kind(here.path), union_tags(here.expected)
    if not isinstance(given, str):
        return f"must be text, not {quote_value(given)}; possible: {one_of(possible)}"
    if kind in KINDS:
        return registry.unknown(kind, given)
    return f"no {kind} {given!r}; possible: {one_of(possible)}{did_you_mean(given, possible)}"


def _missing_tag(detail: ErrorDetail, here: TypeAtLocation, registry: Registry) -> str:
    possible = one_of(union_tags(here.expected))
    given = detail["input"]
    if isinstance(given, dict):
        return f"needs a 'name'; possible: {possible}"
    return f"must be a name or a mapping with a name, not {quote_value(given)}; possible: {possible}"


def _component_kind(path: SpecPath) -> str:
    """Return the kind of component that a path holds, or else its last key."""
    keys = [part for part in path if isinstance(part, str)]
    return "kv_loss" if keys[-1] == "losses" else keys[-1]


def _words_of_validator(detail: ErrorDetail, here: TypeAtLocation, registry: Registry) -> str:
    return str(detail["ctx"]["error"])


_Sentence = Callable[[ErrorDetail, TypeAtLocation, Registry], str]

_SENTENCES: dict[str, _Sentence] = {
    "missing": lambda detail, here, registry: "is missing",
    "extra_forbidden": _unknown_key,
    "literal_error": _unknown_word,
    "union_tag_invalid": _unknown_tag,
    "union_tag_not_found": _missing_tag,
    "too_short": lambda detail, here, registry: f"needs at least {detail['ctx']['min_length']} entry",
    "value_error": _words_of_validator,
    "assertion_error": _words_of_validator,
}
"""pydantic's type of an error to the function that describes it."""

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
"""pydantic's type of an error to what the value must be."""

_BOUNDS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
}
"""pydantic's type of an error to what the value must be, with the numbers of its ctx."""

_NAME_PATTERN = Name.__metadata__[0].pattern  # type: ignore[attr-defined]


def _expected_value(detail: ErrorDetail, here: TypeAtLocation) -> str | None:
    """Return what the value must be, as it reads after ``must be``; None if that says too little."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        numbers = {key: _bound_text(value) for key, value in context.items()}
        return _BOUNDS[kind].format(**numbers)
    if kind == "literal_error":
        return " or ".join(map(repr, literal_values(here.expected))) or None
    if kind == "string_pattern_mismatch":
        return _describe_pattern(context["pattern"])
    return _TYPES.get(kind)


def _describe_pattern(pattern: str) -> str:
    if pattern == _NAME_PATTERN:
        return "letters, digits, '_', '.' and '-', starting with a letter or digit"
    return f"text matching {pattern}"


def _bound_text(value: Any) -> str:
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)
