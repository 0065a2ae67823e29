"""The spec bound to what is installed, and its JSON Schema."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from kava_core.config import ComponentConfig, KVLossConfig
from kava_core.registry import Registered, Registry
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.errors_text import explain_errors
from kava_core.specfile.schema import json_schema
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

FIELDS: dict[str, Any] = {
    "name": "tiny",
    "student": {"path": "somewhere"},
    "teachers": [{"name": "big", "path": "elsewhere"}],
    "data": {"name": "chain"},
    "train": {"steps": 3},
}


class Picky(KVLossConfig):
    """A loss with a parameter that must be given, and one of every shape."""

    name: Literal["picky"] = "picky"
    component = "nowhere:Picky"
    basis_free: ClassVar[bool] = True

    must: int
    """Has no default."""
    words: list[str] = Field([])
    """A list, not a tuple."""
    bounds: dict[str, tuple[float, float]] = Field({})
    """Pairs by name."""
    either: Literal["a", "b"] | int | None = Field(None, description="A word or a number.")


class Ratio2(ComponentConfig):
    """A second layer mapper."""

    name: Literal["ratio2"] = "ratio2"
    component = "nowhere:Ratio2"


@pytest.fixture(scope="module")
def registry() -> Registry:
    """The built-ins and two more."""
    more = [("kv_loss", Picky), ("layer_mapper", Ratio2)]
    extra = tuple(Registered(kind, config, "acme", "1", "main", "acme") for kind, config in more)
    return Registry(Registry.build().registered + extra)


def messages(registry: Registry, fields: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """Paths and messages of a spec with these fields."""
    model = bind_spec_model(registry)
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(FIELDS | fields), strict=True)
    return [(one.path, one.message) for one in explain_errors(caught.value, model, registry)]


def test_bound_specs_are_specs(registry: Registry) -> None:
    spec = bind_spec_model(registry).model_validate(FIELDS)
    assert isinstance(spec, PipelineSpec)
    assert isinstance(spec.teachers[0], TeacherSpec)
    assert isinstance(spec.teachers[0].align, AlignSpec)


def test_shorthand_equals_the_mapping_with_defaults(registry: Registry) -> None:
    model = bind_spec_model(registry)
    short = model.model_validate(FIELDS | {"losses": ["mse"], "fuser": "fixed"})
    long = model.model_validate(FIELDS | {"losses": [{"name": "mse"}], "fuser": {"name": "fixed"}})
    assert short == long
    assert short.losses[0].weight == 1.0


@pytest.mark.parametrize("mode", ["json", "python"])
def test_parameters_survive_a_dump(registry: Registry, mode: str) -> None:
    model = bind_spec_model(registry)
    loss = {"name": "picky", "must": 3, "words": ["x"], "bounds": {"k": [0.5, 1]}, "either": "b", "weight": 2}
    spec = model.model_validate(FIELDS | {"losses": [loss]})
    dumped = spec.model_dump(mode=mode)
    assert dumped["losses"][0]["must"] == 3
    assert dumped["teachers"][0]["align"]["head_adapter"]["init"] == "grouped"
    assert model.model_validate(dumped) == spec


def test_strict_json_takes_what_yaml_gives(registry: Registry) -> None:
    loss = {
        "name": "picky",
        "must": 3,
        "words": ["x"],
        "bounds": {"k": [0, 1]},
        "either": 4,
        "layers": [0, -1],
    }
    spec = bind_spec_model(registry).model_validate_json(json.dumps(FIELDS | {"losses": [loss]}), strict=True)
    assert spec.losses[0].layers == (0, -1)
    assert spec.losses[0].model_dump()["bounds"] == {"k": (0.0, 1.0)}


def test_shorthand_with_a_missing_parameter(registry: Registry) -> None:
    assert messages(registry, {"losses": ["picky"]}) == [(("losses", 0, "must"), "is missing")]


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"must": "3"}, ("must",), "must be a whole number, not '3'"),
        ({"must": 1, "words": "x"}, ("words",), "must be a list, not 'x'"),
        ({"must": 1, "words": [1]}, ("words", 0), "must be text, not 1"),
        ({"must": 1, "bounds": {"k": [1, "x"]}}, ("bounds", "k", 1), "must be a number, not 'x'"),
        ({"must": 1, "bounds": {"k": 3}}, ("bounds", "k"), "must be a list, not 3"),
        ({"must": 1, "either": "c"}, ("either",), "must be 'a' or 'b' or a whole number, not 'c'"),
        ({"must": 1, "either": [1]}, ("either",), "must be 'a' or 'b' or a whole number, not a list"),
        ({"must": 1, "weights": 1}, ("weights",), "unknown key; possible: name, weight, share, "
         "schedule, end, parts, "
         "layers, must, words, bounds, either; did you mean 'weight'?"),
    ],
)  # fmt: skip
def test_findings_in_third_party_parameters(
    registry: Registry, given: dict[str, Any], path: tuple[str | int, ...], message: str
) -> None:
    assert messages(registry, {"losses": [{"name": "picky", **given}]}) == [(("losses", 0, *path), message)]


def test_a_default_that_is_not_installed() -> None:
    built_in = Registry.build().registered
    registry = Registry(tuple(one for one in built_in if one.kind != "fuser"))
    assert messages(registry, {}) == [(("fuser",), "no fuser 'fixed'; possible: none")]


def test_field_docs_and_defaults_survive(registry: Registry) -> None:
    model = bind_spec_model(registry)
    for name, field in PipelineSpec.model_fields.items():
        assert model.model_fields[name].description == field.description
        assert model.model_fields[name].default == field.default
    assert model.__doc__ == PipelineSpec.__doc__


def test_schema_knows_what_is_installed(registry: Registry) -> None:
    schema = json_schema(registry)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    options = schema["properties"]["losses"]["items"]["oneOf"]
    assert {"$ref": "#/$defs/Picky"} in options
    (words,) = [option["enum"] for option in options if "enum" in option]
    assert words == registry.names("kv_loss")
    picky = schema["$defs"]["Picky"]
    assert picky["required"] == ["name", "must"]
    assert picky["properties"]["must"]["description"] == "Has no default."
    assert picky["additionalProperties"] is False
    assert "align" in schema["$defs"]["TeacherSpec"]["properties"]


def test_every_field_is_documented() -> None:
    schema = json_schema(Registry.build())
    models = schema["$defs"]
    for model in [schema, *models.values()]:
        for name, field in model["properties"].items():
            # A field whose words are those of its own class is a bare reference.
            of_class = models.get(field.get("$ref", "").rpartition("/")[2], {}).get("description")
            assert name == "name" or field.get("description") or of_class, f"{model['title']}.{name}"
