"""``key=value`` on the command line, and the changes of a variant: the same rules for both."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import shorten

from kava_core.errors import SpecError
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation
from kava_core.specfile.reading.yaml_loader import parse_yaml


def apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """A copy with every ``key=value`` set, in order; InvalidSpecError with all that cannot be.

    Keys are dotted paths with list indexes, such as ``losses.0.weight``; values are read as in a spec, so
    ``seeds=[0,1]`` is a list and ``output=`` is null.
    """
    changed, errors = document.copy(), []
    for text in overrides:
        try:
            _apply_override(changed, text)
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise InvalidSpecError(errors)
    return changed


def _apply_override(document: Document, text: str) -> None:
    key, equals, written = text.partition("=")
    place = SourceLocation(f"override {shorten(text, 100, placeholder='…')}")
    if not equals:
        raise SpecError(place.error("must be key=value, such as train.steps=100"))
    value = parse_yaml(written, place)[0] if written.strip() else None
    document.set(key.strip(), value, place)
