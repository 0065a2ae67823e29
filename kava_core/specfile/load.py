"""Load a spec: read the file, apply overrides, validate; every error at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kava_core.errors import SpecError
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.errors_text import MOST_FINDINGS, Finding, explain_errors, quote_value
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.overrides import apply_overrides
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation, SpecPath, dotted_path
from kava_core.specfile.reading.yaml_loader import parse_yaml, read_spec_text
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class LoadedSpec:
    """A spec and where it came from."""

    spec: PipelineSpec
    """The spec, validated against what is installed."""
    source: str
    """Text of the file."""
    document: Document
    """Values and their locations, with overrides applied."""
    model: type[PipelineSpec]
    """The class that the spec was validated by."""
    registry: Registry
    """What is installed."""

    @property
    def origins(self) -> dict[str, str]:
        """Return where every value that is not a default was written: dotted path to ``file:line``, or to
        ``override``."""
        origins = {}
        for path in _leaf_paths(self.document.data, ()):
            origins[dotted_path(path)] = self.document.locations.value_location(path).origin
        return origins

    def digest(self) -> str:
        """Return ten hexadecimal digits that name what the spec asks for."""
        return spec_digest(self.spec)


def load_spec(
    file: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None
) -> LoadedSpec:
    """Read, override and validate a spec.

    Args:
        file: the spec, in YAML.
        overrides: changes such as ``train.steps=100``.
        registry: the components that a spec may use; default: what is installed.

    Raises:
        SpecError: at the first thing that is not strict YAML.
        InvalidSpecError: the YAML is right and the spec is not. It has one line for everything wrong:
            ``file:line:col: dotted.path: what is wrong; possible: …; did you mean …``.
    """
    source, document = read_document(file, overrides)
    registry = registry or Registry.build()
    model = bind_spec_model(registry)
    spec = validate_document(document, model, registry)
    return LoadedSpec(spec, source, document, model, registry)


def read_document(file: str | Path, overrides: Iterable[str] = ()) -> tuple[str, Document]:
    """Read text and document of a spec, with overrides applied, without validating it.

    Raises:
        SpecError: as for ``load_spec``.
    """
    source = read_spec_text(file)
    start = SourceLocation(str(file), 1, 1)
    data, locations = parse_yaml(source, start)
    if not isinstance(data, dict):
        raise SpecError(start.error_text(f"a spec must be a mapping, not {quote_value(data)}"))
    return source, apply_overrides(Document(data, locations), overrides)


def validate_document(document: Document, model: type[PipelineSpec], registry: Registry) -> PipelineSpec:
    """Return the spec that a document describes.

    Raises:
        InvalidSpecError: with every finding, in the order of the lines; those of overrides first.
    """
    try:
        # As JSON, strict mode takes lists for tuples and still no text for numbers.
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        findings, count = explain_errors(error, model, registry), error.error_count()
    located = [(_location_of_finding(finding, document), finding) for finding in findings]
    located.sort(key=lambda pair: (pair[0].line or 0, pair[0].column or 0))
    lines = [document.error_text(location, finding.message, finding.path) for location, finding in located]
    if count > MOST_FINDINGS:
        start = document.locations.start
        lines.append(document.error_text(start, f"and {count - MOST_FINDINGS:,} more things are wrong"))
    raise InvalidSpecError(lines)


def _location_of_finding(finding: Finding, document: Document) -> SourceLocation:
    if finding.at_key or finding.missing:
        return document.locations.key_location(finding.path)
    return document.locations.value_location(finding.path)


def _leaf_paths(value: Any, path: SpecPath) -> Iterator[SpecPath]:
    """Iterate over the paths of scalars and of empty lists and mappings."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaf_paths(below, (*path, key))
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from _leaf_paths(below, (*path, index))
    else:
        yield path
