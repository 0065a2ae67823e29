"""Variants: named changes of one spec, resolved by the machinery of command-line overrides."""

from __future__ import annotations

from copy import deepcopy

from kava_core.errors import SpecError
from kava_core.spec.document import Document
from kava_core.spec.load import LoadedSpec, validate
from kava_core.spec.model import PipelineSpec
from kava_core.spec.places import InvalidSpecError, Place

SHARED = ("name", "seeds", "variants", "output")
"""Fields that belong to all variants together, so that they stay comparable and side by side."""


def resolve_variants(loaded: LoadedSpec) -> dict[str, PipelineSpec]:
    """Each variant as a spec of its own, without variants; ``{"main": spec}`` where there are none.

    InvalidSpecError with everything wrong in any variant, at the variant's lines.
    """
    if not loaded.spec.variants:
        return {"main": loaded.spec}
    resolved, errors = {}, list[str]()
    for name in loaded.spec.variants:
        try:
            resolved[name] = validate(_changed(loaded.document, name), loaded.model, loaded.registry)
        except InvalidSpecError as error:
            errors += error.lines
    if errors:
        raise InvalidSpecError(errors)
    return resolved


def _changed(base: Document, name: str) -> Document:
    """The base with one variant's changes; InvalidSpecError with those that cannot be made."""
    document, errors = base.copy(f"variant {name}: "), list[str]()
    del document.data["variants"]
    for key, value in base.data["variants"][name].items():
        places = base.places.below(("variants", name, key))
        try:
            _refuse_shared(document, key, places.start)
            document.set(key, deepcopy(value), places.start, places)
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise InvalidSpecError(errors)
    return document


def _refuse_shared(document: Document, key: str, place: Place) -> None:
    field = key.partition(".")[0]
    if field in SHARED:
        message = f"a variant cannot change {field!r}: all variants share it"
        raise SpecError(document.error(place, message))
