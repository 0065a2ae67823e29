"""Variants: named changes of one spec, resolved by the machinery of command-line overrides."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.specfile.load import LoadedSpec, validate_document
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation, SpecPath
from kava_core.specfile.sections.compare import CompareSpec, Control, control_changes
from kava_core.specfile.sections.pipeline import PipelineSpec

MAIN = "main"
"""The only variant of a spec that declares none."""

SHARED_FIELDS = ("name", "seeds", "variants", "compare", "output")
"""Fields that belong to all variants together, so that they stay comparable and side by side."""


def resolve_variants(loaded: LoadedSpec) -> dict[str, PipelineSpec]:
    """Each variant as a spec of its own, without variants and comparisons; ``{"main": spec}`` where there are
    none. Controls that ``compare`` asks for are variants too.

    InvalidSpecError with everything wrong in any variant, at the variant's lines.
    """
    spec = loaded.spec
    if not spec.variants and spec.compare is None:
        return {MAIN: spec}
    compare = spec.compare or CompareSpec()
    declared, errors = dict.fromkeys(spec.variants or (MAIN,)), _wrong_names(loaded, compare)
    resolved = dict[str, PipelineSpec]()
    controls = () if errors else compare.controls
    for name, control in [(name, None) for name in declared] + [(word, word) for word in controls]:
        try:
            document = _document_of_variant(loaded.document, treatment_variant(spec) if control else name)
            if control is not None:
                _apply_control(document, loaded, control)
            resolved[name] = validate_document(document, loaded.model, loaded.registry)
        except InvalidSpecError as error:
            errors += error.lines
    if errors:
        raise InvalidSpecError(errors)
    return resolved


def chosen_runs(
    variants: Mapping[str, PipelineSpec], variant: str | None = None, seed: int | None = None
) -> list[tuple[str, int, PipelineSpec]]:
    """Variant, seed and spec of every run, or of those asked for; SpecError for what there is not."""
    if variant is not None and variant not in variants:
        possible = f"possible: {one_of(variants)}{did_you_mean(variant, variants)}"
        raise SpecError(f"--variant: no variant {variant!r}; {possible}")
    seeds = next(iter(variants.values())).seeds
    if seed is not None and seed not in seeds:
        raise SpecError(f"--seed: the spec has no seed {seed}; possible: {', '.join(map(str, seeds))}")
    return [
        (name, number, spec)
        for name, spec in variants.items()
        for number in spec.seeds
        if variant in (None, name) and seed in (None, number)
    ]


def treatment_variant(spec: PipelineSpec) -> str:
    """The variant that controls are made of."""
    named = spec.compare.treatment if spec.compare is not None else None
    return named or next(iter(spec.variants), MAIN)


def _wrong_names(loaded: LoadedSpec, compare: CompareSpec) -> list[str]:
    """A line for everything that ``compare`` names and that is not there, or is there twice."""
    variants = tuple(loaded.spec.variants or (MAIN,))
    known = (*variants, *compare.controls)
    named = {("treatment",): compare.treatment} if compare.treatment is not None else {}
    asked = {
        ("pairs", row, side): name for row, pair in enumerate(compare.pairs) for side, name in enumerate(pair)
    }
    found: list[tuple[SpecPath, str]] = [
        (path, f"no variant {name!r}; possible: {one_of(possible)}{did_you_mean(name, possible)}")
        for names, possible in ((named, variants), (asked, known))
        for path, name in names.items()
        if name not in possible
    ]
    found += [
        (("controls", place), f"variant {word!r} exists already; rename it")
        for place, word in enumerate(compare.controls)
        if word in variants
    ]
    document = loaded.document
    return [
        document.error(document.places.value(("compare", *path)), message, ("compare", *path))
        for path, message in found
    ]


def _document_of_variant(base: Document, name: str) -> Document:
    """The base with one variant's changes; InvalidSpecError with those that cannot be made."""
    document, errors = base.copy(f"variant {name}: "), list[str]()
    variants = document.data.pop("variants", None) or {}
    document.data.pop("compare", None)
    for key, value in (variants.get(name) or {}).items():
        places = base.places.below(("variants", name, key))
        try:
            _refuse_shared(document, key, places.start)
            document.set(key, deepcopy(value), places.start, places)
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise InvalidSpecError(errors)
    return document


def _apply_control(document: Document, loaded: LoadedSpec, control: Control) -> None:
    """Make a treatment's document the control's; InvalidSpecError where there is nothing to break."""
    place = loaded.document.places.value(("compare", "controls"))
    document.context = f"variant {control}: "
    asked = loaded.spec.compare or CompareSpec()
    teachers, losses = (document.data.get(field) or [] for field in ("teachers", "losses"))
    if not losses:
        raise InvalidSpecError([document.error(place, "the treatment has no KV losses: nothing to control")])
    for key, value in control_changes(control, asked, len(teachers)).items():
        document.set(key, value, place)


def _refuse_shared(document: Document, key: str, place: SourceLocation) -> None:
    field = key.partition(".")[0]
    if field in SHARED_FIELDS:
        message = f"a variant cannot change {field!r}: all variants share it"
        raise SpecError(document.error(place, message))
