"""PipelineSpec narrowed to what is installed: component fields become tagged unions of declarations."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from kava_core.config import ComponentConfig
from kava_core.declarations import base_of
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

SHORTHAND = "(name)"
"""Tag of a component written as its bare name; no component can be called that."""


def bind_spec_model(registry: Registry) -> type[PipelineSpec]:
    """A subclass of PipelineSpec that accepts exactly the components of this registry.

    A component is written as its name, or as a mapping with its name and parameters.
    """
    parts = {kind: component_type(registry, kind) for kind in KINDS}
    stages = {kind: part for kind, part in parts.items() if kind in AlignSpec.model_fields}
    align = _narrow_fields(AlignSpec, {**stages, "token_warper": parts["time_warper"] | None})
    teacher = _narrow_fields(TeacherSpec, {"align": align})
    many = {"teachers": _tuple_of(teacher), "losses": _tuple_of(parts["kv_loss"])}
    return cast(type[PipelineSpec], _narrow_fields(PipelineSpec, {**many, "fuser": parts["fuser"]}))


def component_type(registry: Registry, kind: str) -> Any:
    """The annotation of a field that holds one component of this kind."""
    configs = {config.component_name(): config for config in registry.configs(kind)}
    if not configs:
        return _type_of_nothing(registry, kind)

    def construct(name: str) -> ComponentConfig:
        return configs[name](name=name)

    def tag(value: Any) -> Any:
        if isinstance(value, str):
            return SHORTHAND if value in configs else value
        return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)

    words: Any = Literal
    bare = _annotated_type(words[tuple(configs)], AfterValidator(construct), Tag(SHORTHAND))
    members = [_annotated_type(config, Tag(name)) for name, config in configs.items()]
    return _annotated_type(reduce(or_, [*members, bare]), Discriminator(tag))


def _type_of_nothing(registry: Registry, kind: str) -> Any:
    """Refuses every name, because no component of this kind is installed."""

    def refuse(value: Any) -> Any:
        name = value.get("name") if isinstance(value, dict) else value
        message = registry.unknown(kind, str(name))
        raise PydanticCustomError("component_unknown", "{told}", {"told": message})

    return _annotated_type(base_of(kind), BeforeValidator(refuse))


def _annotated_type(item: Any, *metadata: Any) -> Any:
    annotated: Any = Annotated
    return annotated[(item, *metadata)]


def _tuple_of(item: Any) -> Any:
    many: Any = tuple
    return many[item, ...]


def _narrow_fields(model: Any, annotations: dict[str, Any]) -> Any:
    """A subclass of the same name whose fields have these annotations, and the old defaults and docs."""
    fields: dict[str, Any] = {
        name: (annotation, _same_field(model.model_fields[name])) for name, annotation in annotations.items()
    }
    return create_model(model.__name__, __base__=model, __module__=__name__, __doc__=model.__doc__, **fields)


def _same_field(field: FieldInfo) -> Any:
    return Field(default=field.default, description=field.description)
