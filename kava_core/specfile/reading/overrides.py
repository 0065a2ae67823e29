"""Apply ``key=value`` of the command line to a document, by the rules that hold for variants as well."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import shorten

from kava_core.errors import SpecError
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation
from kava_core.specfile.reading.yaml_loader import parse_yaml


def apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """Return a copy of a document with every ``key=value`` set, in order.

    Keys are dotted paths with list indexes, such as ``losses.0.weight``; values are read as in a spec, so
    ``seeds=[0,1]`` is a list and ``output=`` is null.

    Raises:
        InvalidSpecError: some cannot be set; it has a line for each.
    """
    changed = document.copy()
    errors: list[str] = []
    for override in overrides:
        try:
            _apply_override(changed, override)
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise InvalidSpecError(errors)
    return changed


def _apply_override(document: Document, override: str) -> None:
    key, equals, written = override.partition("=")
    location = SourceLocation(f"override {shorten(override, 100, placeholder='…')}")
    if not equals:
        raise SpecError(location.error_text("must be key=value, such as train.steps=100"))
    value = parse_yaml(written, location)[0] if written.strip() else None
    document.set_value(key.strip(), value, location)
