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
from kava_core.specfile.bind import bind
from kava_core.specfile.digest import digest
from kava_core.specfile.errors_text import Finding, findings, shown
from kava_core.specfile.reading.document import Document
from kava_core.specfile.reading.overrides import override
from kava_core.specfile.reading.places import InvalidSpecError, Path, Place, dotted
from kava_core.specfile.reading.yaml_loader import parse, read_source
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
        """Dotted path to ``file:line`` or ``override``, for every value that is not a default."""
        places, leaves = self.document.places, _leaves(self.document.data, ())
        return {dotted(path): places.value(path).origin for path in leaves}

    def digest(self) -> str:
        """Ten hexadecimal digits that name what the spec asks for."""
        return digest(self.spec)


def load(file: str | File, overrides: Iterable[str] = (), registry: Registry | None = None) -> LoadedSpec:
    """Read, override and validate a spec.

    SpecError at the first thing that is not strict YAML; otherwise InvalidSpecError with one line for
    everything wrong: ``file:line:col: dotted.path: what is wrong; possible: …; did you mean …``.
    """
    source, document = read_document(file, overrides)
    registry = registry or Registry.build()
    model = bind(registry)
    return LoadedSpec(validate(document, model, registry), source, document, model, registry)


def read_document(file: str | File, overrides: Iterable[str] = ()) -> tuple[str, Document]:
    """Text and document of a spec, with overrides applied, not yet validated; SpecError as for ``load``."""
    source, start = read_source(file), Place(str(file), 1, 1)
    data, places = parse(source, start)
    if not isinstance(data, dict):
        raise SpecError(start.error(f"a spec must be a mapping, not {shown(data)}"))
    return source, override(Document(data, places), overrides)


def validate(document: Document, model: type[PipelineSpec], registry: Registry) -> PipelineSpec:
    """The spec a document describes; InvalidSpecError with every finding, in the order of the lines."""
    try:
        # As JSON, strict mode takes lists for tuples and still no text for numbers.
        return model.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        found = [_located(finding, document) for finding in findings(error, model, registry)]
        lines = sorted(found, key=lambda one: (one[0].line or 0, one[0].column or 0))
        raise InvalidSpecError(line for _, line in lines) from None


def _located(finding: Finding, document: Document) -> tuple[Place, str]:
    path, places = finding.path, document.places
    at_key = finding.at_key or finding.missing
    place = places.key(path) if at_key else places.value(path)
    return place, document.error(place, finding.message, path)


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    """Paths of scalars and of empty lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [leaf for key, below in items for leaf in _leaves(below, (*path, key))]
    yield from inside or [path]
