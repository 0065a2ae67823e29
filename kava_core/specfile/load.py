"""From a file to a validated spec: read, override, validate; every error at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from pydantic import ValidationError

from kava_core.errors import SpecError
from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.digest import spec_digest
from kava_core.specfile.errors_text import Finding, explain_errors, quote_value
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.overrides import apply_overrides
from kava_core.specfile.reading.source_map import InvalidSpecError, SourceLocation, SpecPath, dotted_path
from kava_core.specfile.reading.yaml_loader import parse_yaml, read_spec_text
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class LoadedSpec:
    """A spec and where it came from."""

    spec: PipelineSpec
    """Validated against what is installed."""
    source: str
    """Text of the file."""
    document: Document
    """Values and places, with overrides applied."""
    model: type[PipelineSpec]
    """What the spec was validated by."""
    registry: Registry
    """What is installed."""

    @property
    def origins(self) -> dict[str, str]:
        """Dotted path to ``file:line`` or ``apply_overrides``, for every value that is not a default."""
        places, leaves = self.document.places, _leaf_paths(self.document.data, ())
        return {dotted_path(path): places.value(path).origin for path in leaves}

    def digest(self) -> str:
        """Ten hexadecimal digits that name what the spec asks for."""
        return spec_digest(self.spec)


def load_spec(
    file: str | File, overrides: Iterable[str] = (), registry: Registry | None = None
) -> LoadedSpec:
    """Read, override and validate a spec.

    SpecError at the first thing that is not strict YAML; otherwise InvalidSpecError with one line for
    everything wrong: ``file:line:col: dotted_path.path: what is wrong; possible: …; did you mean …``.
    """
    source, document = read_document(file, overrides)
    registry = registry or Registry.build()
    model = bind_spec_model(registry)
    return LoadedSpec(validate_document(document, model, registry), source, document, model, registry)


def read_document(file: str | File, overrides: Iterable[str] = ()) -> tuple[str, Document]:
    """Text and document of a spec, with overrides applied, not yet validated; errors as for ``load_spec``."""
    source, start = read_spec_text(file), SourceLocation(str(file), 1, 1)
    data, places = parse_yaml(source, start)
    if not isinstance(data, dict):
        raise SpecError(start.error(f"a spec must be a mapping, not {quote_value(data)}"))
    return source, apply_overrides(Document(data, places), overrides)


def validate_document(document: Document, model: type[PipelineSpec], registry: Registry) -> PipelineSpec:
    """The spec a document describes; InvalidSpecError with every finding, in the order of the lines."""
    try:
        # As JSON, strict mode takes lists for tuples and still no text for numbers.
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        found = [_locate_finding(finding, document) for finding in explain_errors(error, model, registry)]
        lines = sorted(found, key=lambda one: (one[0].line or 0, one[0].column or 0))
        raise InvalidSpecError(line for _, line in lines) from None


def _locate_finding(finding: Finding, document: Document) -> tuple[SourceLocation, str]:
    path, places = finding.path, document.places
    at_key = finding.at_key or finding.missing
    place = places.key(path) if at_key else places.value(path)
    return place, document.error(place, finding.message, path)


def _leaf_paths(value: Any, path: SpecPath) -> Iterator[SpecPath]:
    """Paths of scalars and of empty lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [leaf for key, below in items for leaf in _leaf_paths(below, (*path, key))]
    yield from inside or [path]
