"""Follow the location of a validation error through the spec's types.

pydantic's locations mix keys of the document with labels of union members; only the types can tell them
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from kava_core.specfile.reading.source_map import SpecPath


@dataclass(frozen=True)
class TypeAtLocation:
    """What the spec's types expect at the location of an error."""

    path: SpecPath
    """Keys and indexes of the document, without labels of union members."""
    expected: Any
    """The type expected there; None if the types do not determine it."""
    parent: Any
    """The type one key above."""
    alternative: bool
    """Whether the location is inside one member of an untagged union."""
    is_key: bool
    """Whether a mapping's key itself is wrong."""


def follow_location(model: type[BaseModel], location: Sequence[str | int]) -> TypeAtLocation:
    """Return the type at a location; unknown keys at its end are kept as they are."""
    path: list[str | int] = []
    here: Any = model
    parent: Any = None
    alternative = is_key = False
    for step in location:
        members = union_members(here)
        if step == "[key]":
            is_key = True
        elif len(members) > 1:
            here = _member_with_label(members, step)
            alternative = not _is_tagged_union(members)
        else:
            parent = _only_member(members)
            here = _type_below(parent, step)
            alternative = False
            path.append(step)
    return TypeAtLocation(tuple(path), here, parent, alternative, is_key)


def union_members(annotation: Any) -> list[Any]:
    """Return the members of a union, without None; of any other type, the type alone."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    members: list[Any] = []
    for argument in get_args(annotation):
        members += union_members(argument)
    return [member for member in members if member is not type(None)]


def literal_values(annotation: Any) -> list[str]:
    """Return all words that the Literals in a type allow."""
    values: list[str] = []
    for member in union_members(annotation):
        if get_origin(member) is Literal:
            values += map(str, get_args(member))
    return values


def union_tags(annotation: Any) -> list[str]:
    """Return the names of the models in a tagged union."""
    tags = [_tag_of_model(member) for member in union_members(annotation)]
    return [tag for tag in tags if tag is not None]


def accepted_keys(annotation: Any) -> list[str]:
    """Return the keys that a model accepts; none if the type is no model."""
    only = _only_member(union_members(annotation))
    return list(only.model_fields) if _is_model(only) else []


def _only_member(members: list[Any]) -> Any:
    return members[0] if len(members) == 1 else None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tag_of_model(member: Any) -> str | None:
    """Return the default of a model's field ``name``, if that is its only possible value."""
    field = member.model_fields.get("name") if _is_model(member) else None
    return str(field.default) if field and get_origin(field.annotation) is Literal else None


def _is_tagged_union(members: list[Any]) -> bool:
    return any(_tag_of_model(member) is not None for member in members)


def _member_with_label(members: list[Any], label: str | int) -> Any:
    """Return the member that pydantic labels so: by tag, class name, or start of its type.

    The last is ``tuple[int, ...]``, for example.
    """
    for member in members:
        names = (_tag_of_model(member), getattr(member, "__name__", None))
        if label in names and get_origin(member) is None:
            return member
    for member in members:
        if str(label).startswith(f"{_origin_name(member)}["):
            return member
    return None


def _origin_name(member: Any) -> str:
    origin = get_origin(member)
    return "literal" if origin is Literal else str(getattr(origin, "__name__", ""))


def _type_below(annotation: Any, step: str | int) -> Any:
    """Return the type under a key or index."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(step))
        return field.annotation if field else None
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return arguments[1]
    return arguments[0] if get_origin(annotation) in (tuple, list) else None
