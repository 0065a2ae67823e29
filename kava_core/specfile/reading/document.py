"""Hold a spec as it was written: plain values and their locations. Changes are made before validation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from kava_core.errors import SpecError
from kava_core.hookspecs import KINDS
from kava_core.specfile.reading.source_map import (
    MAX_DEPTH,
    SourceLocation,
    SourceMap,
    SpecPath,
    dotted_path,
)

_ROOT: SpecPath = ()


@dataclass
class Document:
    """The values of a spec and their locations; ``set_value`` changes both."""

    data: Any
    locations: SourceMap
    context: str = ""
    """What errors put after the location, such as ``variant wide: ``."""

    def copy(self, context: str = "") -> Document:
        """Return an independent copy, with a context of its own."""
        return Document(deepcopy(self.data), self.locations.copy(), context)

    def error_text(self, location: SourceLocation, message: str, path: SpecPath = ()) -> str:
        """Return the line of an error: ``location: context: path: message``."""
        named_path = f"{dotted_path(path)}: " if path else ""
        return location.error_text(f"{self.context}{named_path}{message}")

    def set_value(
        self, key: str, value: Any, location: SourceLocation, inner: SourceMap | None = None
    ) -> None:
        """Put a value at a dotted path.

        Mappings that are missing or null are made; a component's bare name becomes a mapping with it.

        Args:
            key: the dotted path, such as ``train.steps``.
            value: any value of a spec.
            location: where the change was written.
            inner: locations of what is inside the value; default: all of it is at ``location``.

        Raises:
            SpecError: the path leads through something that is neither mapping nor list, or past the end of
                a list.
        """
        path = self._prepare_path(key, location)
        holder = self._value_at(path[:-1])
        holder[path[-1]] = value
        self.locations.forget_path(path)
        self.locations.insert_below(path, inner or SourceMap(location))

    def _value_at(self, path: SpecPath) -> Any:
        value = self.data
        for part in path:
            value = value[part]
        return value

    def _prepare_path(self, key: str, location: SourceLocation) -> SpecPath:
        """Return the path of a dotted key, after making every mapping on the way."""
        rest, path = key.split("."), _ROOT
        if not all(rest) or len(rest) > MAX_DEPTH:
            message = f"{key!r} is not a dotted path such as train.steps"
            raise SpecError(self.error_text(location, message))
        while rest:
            self._open_value(path, location)
            part, rest = self._next_key(rest, path, location)
            path = (*path, part)
            if rest:
                self._make_mapping(path, location)
        return path

    def _next_key(
        self, rest: list[str], path: SpecPath, location: SourceLocation
    ) -> tuple[str | int, list[str]]:
        """Return the next key and what is left after it.

        A key may itself contain dots: if it exists in the document, or if it is the change of a variant.
        """
        holder = self._value_at(path)
        if isinstance(holder, list):
            return self._list_index(holder, rest[0], path, location), rest[1:]
        for length in range(len(rest), 1, -1):
            with_dots = ".".join(rest[:length])
            if with_dots in holder:
                return with_dots, rest[length:]
        is_change_of_variant = len(path) == 2 and path[0] == "variants"
        length = len(rest) if is_change_of_variant else 1
        return ".".join(rest[:length]), rest[length:]

    def _list_index(self, holder: list[Any], given: str, path: SpecPath, location: SourceLocation) -> int:
        if given.isdecimal() and int(given) < len(holder):
            return int(given)
        possible = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
        raise SpecError(self.error_text(location, f"no entry {given!r}; possible: {possible}", path))

    def _make_mapping(self, path: SpecPath, location: SourceLocation) -> None:
        """Put an empty mapping at a path that has no value yet."""
        holder = self._value_at(path[:-1])
        if isinstance(holder, dict) and path[-1] not in holder:
            holder[path[-1]] = {}
            self.locations.keys[path] = location

    def _open_value(self, path: SpecPath, location: SourceLocation) -> None:
        """Turn null, or a component's bare name, into a mapping that something can be put into."""
        value = self._value_at(path)
        if isinstance(value, dict | list):
            return
        is_bare_name = isinstance(value, str) and _holds_component(path)
        if value is not None and not is_bare_name:
            raise SpecError(self.error_text(location, f"has nothing inside: it is {value!r}", path))
        holder = self._value_at(path[:-1])
        holder[path[-1]] = {} if value is None else {"name": value}
        if value is not None:
            name_location = self.locations.value_location(path)
            self.locations.keys[*path, "name"] = name_location
            self.locations.values[*path, "name"] = name_location


def _holds_component(path: SpecPath) -> bool:
    is_loss = len(path) == 2 and path[0] == "losses"
    return is_loss or (bool(path) and path[-1] in KINDS)
