"""Make the JSON Schema of a spec, with the components that are installed, for editors."""

from __future__ import annotations

from typing import Any

from kava_core.registry import Registry
from kava_core.specfile.bind import bind_spec_model


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of PipelineSpec; its fields carry their documentation."""
    schema = bind_spec_model(registry).model_json_schema()
    for definition in schema["$defs"].values():
        _require_name(definition)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _require_name(definition: dict[str, Any]) -> None:
    """Require the tag ``name`` of a tagged mapping, though it is a default of the class."""
    if "const" in definition.get("properties", {}).get("name", {}):
        definition["required"] = ["name", *definition.get("required", [])]
