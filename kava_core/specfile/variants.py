"""Resolve variants: named changes of one spec, made by the machinery of command-line overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.specfile.load import LoadedSpec, validate_document
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation, SpecPath
from kava_core.specfile.sections.compare import CompareSpec, Control, control_changes
from kava_core.specfile.sections.pipeline import PipelineSpec

MAIN = "main"
"""The only variant of a spec that declares none."""

SECTIONS = {"losses": "KV losses", "hidden": "hidden states", "cross_logits": "cross_logits"}
"""The sections of a spec that a control can break, and what they are called."""

BROKEN_SECTIONS: dict[Control, tuple[str, ...]] = {
    "no_kv": ("losses",),
    "random_alignment": ("losses", "hidden"),
    "frozen_probe": ("losses", "hidden"),
}
"""What a control breaks, if not all of them: a treatment without it would equal its control."""

SHARED_FIELDS = ("name", "seeds", "variants", "compare", "output")
"""Fields that belong to all variants together, so that they stay comparable and side by side."""


def resolve_variants(loaded: LoadedSpec) -> dict[str, PipelineSpec]:
    """Return every variant as a spec of its own, without variants and comparisons.

    Controls that ``compare`` asks for are variants too. A spec with neither gives ``{"main": spec}``.

    Raises:
        InvalidSpecError: with everything wrong in any variant, at the variant's lines.
    """
    spec = loaded.spec
    if not spec.variants and spec.compare is None:
        return {MAIN: spec}
    compare = spec.compare or CompareSpec()
    errors = _wrong_names(loaded, compare)
    controls = compare.controls if not errors else ()
    resolved: dict[str, PipelineSpec] = {}
    for name in spec.variants or (MAIN,):
        try:
            document = _document_of_variant(loaded.document, name)
            resolved[name] = validate_document(document, loaded.model, loaded.registry)
        except InvalidSpecError as error:
            errors += error.lines
    for control in controls:
        try:
            document = _document_of_control(loaded, control)
            resolved[control] = validate_document(document, loaded.model, loaded.registry)
        except InvalidSpecError as error:
            errors += error.lines
    if errors:
        raise InvalidSpecError(errors)
    return resolved


def chosen_runs(
    variants: Mapping[str, PipelineSpec], variant: str | None = None, seed: int | None = None
) -> list[tuple[str, int, PipelineSpec]]:
    """Return variant, seed and spec of every run, or of those asked for by ``--variant`` and ``--seed``.

    Raises:
        SpecError: there is no such variant or seed.
    """
    if variant is not None and variant not in variants:
        possible = f"possible: {one_of(variants)}{did_you_mean(variant, variants)}"
        raise SpecError(f"--variant: no variant {variant!r}; {possible}")
    seeds = next(iter(variants.values())).seeds
    if seed is not None and seed not in seeds:
        raise SpecError(f"--seed: the spec has no seed {seed}; possible: {', '.join(map(str, seeds))}")
    runs = []
    for name, spec in variants.items():
        for spec_seed in spec.seeds:
            if variant in (None, name) and seed in (None, spec_seed):
                runs.append((name, spec_seed, spec))
    return runs


def treatment_variant(spec: PipelineSpec) -> str:
    """Return the name of the variant that controls are made of."""
    treatment = spec.compare.treatment if spec.compare is not None else None
    return treatment or next(iter(spec.variants), MAIN)


def _wrong_names(loaded: LoadedSpec, compare: CompareSpec) -> list[str]:
    """Return a line for every name in ``compare`` that does not exist, or exists already."""
    variants = tuple(loaded.spec.variants or (MAIN,))
    found: list[tuple[SpecPath, str]] = []
    if compare.treatment is not None and compare.treatment not in variants:
        found.append((("treatment",), _no_variant(compare.treatment, variants)))
    comparable = (*variants, *compare.controls)
    for row, pair in enumerate(compare.pairs):
        for side, name in enumerate(pair):
            if name not in comparable:
                found.append((("pairs", row, side), _no_variant(name, comparable)))
    for index, control in enumerate(compare.controls):
        if control in variants:
            found.append((("controls", index), f"variant {control!r} exists already; rename it"))
    document = loaded.document
    lines = []
    for path, message in found:
        full_path = ("compare", *path)
        location = document.locations.value_location(full_path)
        lines.append(document.error_text(location, message, full_path))
    return lines


def _no_variant(name: str, possible: Iterable[str]) -> str:
    return f"no variant {name!r}; possible: {one_of(possible)}{did_you_mean(name, possible)}"


def _document_of_variant(base: Document, name: str) -> Document:
    """Return a copy of the base with one variant's changes.

    Raises:
        InvalidSpecError: some changes cannot be made.
    """
    document = base.copy(f"variant {name}: ")
    variants = document.data.pop("variants", None) or {}
    document.data.pop("compare", None)
    errors: list[str] = []
    for key, value in (variants.get(name) or {}).items():
        locations = base.locations.part_below(("variants", name, key))
        try:
            _refuse_shared_field(document, key, locations.start)
            document.set_value(key, deepcopy(value), locations.start, locations)
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise InvalidSpecError(errors)
    return document


def _document_of_control(loaded: LoadedSpec, control: Control) -> Document:
    """Return the treatment's document with what the control changes of it.

    Raises:
        InvalidSpecError: the treatment has nothing that the control would break.
    """
    document = _document_of_variant(loaded.document, treatment_variant(loaded.spec))
    document.context = f"variant {control}: "
    location = loaded.document.locations.value_location(("compare", "controls"))
    sections = BROKEN_SECTIONS.get(control, tuple(SECTIONS))
    if all(document.data.get(section) in (None, []) for section in sections):
        missing = " or ".join(SECTIONS[section] for section in sections)
        message = f"the treatment has no {missing}: nothing to control"
        raise InvalidSpecError([document.error_text(location, message)])
    compare = loaded.spec.compare or CompareSpec()
    teachers = len(document.data.get("teachers") or [])
    for key, value in control_changes(control, compare, teachers).items():
        document.set_value(key, value, location)
    return document


def _refuse_shared_field(document: Document, key: str, location: SourceLocation) -> None:
    field = key.partition(".")[0]
    if field in SHARED_FIELDS:
        message = f"a variant cannot change {field!r}: all variants share it"
        raise SpecError(document.error_text(location, message))
