"""Bind PipelineSpec to what is installed: component fields become tagged unions of declarations."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from kava_core.config import ComponentConfig
from kava_core.declarations import base_class_of_kind
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

SHORTHAND = "(name)"
"""Tag of a component written as its bare name; no component can be called that."""


def bind_spec_model(registry: Registry) -> type[PipelineSpec]:
    """Return a subclass of PipelineSpec that accepts exactly the components of a registry.

    A component is written as its name, or as a mapping with its name and parameters.
    """
    types = {kind: component_type(registry, kind) for kind in KINDS}
    stages = {kind: types[kind] for kind in KINDS if kind in AlignSpec.model_fields}
    stages["token_warper"] = types["time_warper"] | None
    align = _narrow_fields(AlignSpec, stages)
    teacher = _narrow_fields(TeacherSpec, {"align": align})
    narrowed = {
        "teachers": _tuple_of(teacher),
        "losses": _tuple_of(types["kv_loss"]),
        "fuser": types["fuser"],
    }
    return cast(type[PipelineSpec], _narrow_fields(PipelineSpec, narrowed))


def component_type(registry: Registry, kind: str) -> Any:
    """Return the type of a field that holds one component of this kind: a union tagged by name."""
    configs = {config.component_name(): config for config in registry.configs(kind)}
    if not configs:
        return _type_of_nothing(registry, kind)

    def construct(name: str) -> ComponentConfig:
        return configs[name](name=name)

    def tag_of_value(value: Any) -> Any:
        if isinstance(value, str):
            return SHORTHAND if value in configs else value
        return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)

    literal: Any = Literal
    bare_name = _annotated_type(literal[tuple(configs)], AfterValidator(construct), Tag(SHORTHAND))
    members = [_annotated_type(config, Tag(name)) for name, config in configs.items()]
    return _annotated_type(reduce(or_, [*members, bare_name]), Discriminator(tag_of_value))


def _type_of_nothing(registry: Registry, kind: str) -> Any:
    """Return a type that refuses every name, because no component of this kind is installed."""

    def refuse(value: Any) -> Any:
        name = value.get("name") if isinstance(value, dict) else value
        message = registry.unknown(kind, str(name))
        raise PydanticCustomError("component_unknown", "{message}", {"message": message})

    return _annotated_type(base_class_of_kind(kind), BeforeValidator(refuse))


def _annotated_type(item: Any, *metadata: Any) -> Any:
    # Through Any: a type checker reads these subscripts as annotations, and they are made at run time.
    annotated: Any = Annotated
    return annotated[(item, *metadata)]


def _tuple_of(item: Any) -> Any:
    any_tuple: Any = tuple
    return any_tuple[item, ...]


def _narrow_fields(model: Any, annotations: dict[str, Any]) -> Any:
    """Return a subclass of the same name whose fields have these types, and the old defaults and docs."""
    fields: dict[str, Any] = {}
    for name, annotation in annotations.items():
        fields[name] = (annotation, _same_field(model.model_fields[name]))
    return create_model(model.__name__, __base__=model, __module__=__name__, __doc__=model.__doc__, **fields)


def _same_field(field: FieldInfo) -> Any:
    return Field(default=field.default, description=field.description)
