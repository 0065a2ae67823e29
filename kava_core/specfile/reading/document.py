"""A spec as it was written: plain values and where they stand. Changes are made before validation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from kava_core.errors import SpecError
from kava_core.hookspecs import KINDS
from kava_core.specfile.reading.source_map import MAX_DEPTH, SourceLocation, SourceMap, SpecPath, dotted_path

_ROOT: SpecPath = ()


@dataclass
class Document:
    """Values and places; ``set`` changes both."""

    data: Any
    places: SourceMap
    context: str = ""
    """What errors say after the place, such as ``variant wide: ``."""

    def copy(self, context: str = "") -> Document:
        """An independent copy, with a context of its own."""
        return Document(deepcopy(self.data), self.places.copy(), context)

    def error(self, place: SourceLocation, message: str, path: SpecPath = ()) -> str:
        """``place: context: path: message``."""
        return place.error(self.context + (f"{dotted_path(path)}: " if path else "") + message)

    def set(self, key: str, value: Any, place: SourceLocation, inner: SourceMap | None = None) -> None:
        """Put a value at a dotted path; ``inner`` has the places of what is inside it.

        SpecError where the path leads through something that is neither mapping nor list, or past a list's
        end. Mappings that are missing or null are made; a component's bare name becomes a mapping with it.
        """
        path = self._prepare(key, place)
        holder = self._at(path[:-1])
        holder[path[-1]] = value
        self.places.forget(path)
        self.places.graft(path, inner or SourceMap(place))

    def _at(self, path: SpecPath) -> Any:
        value = self.data
        for part in path:
            value = value[part]
        return value

    def _prepare(self, key: str, place: SourceLocation) -> SpecPath:
        """The path of a dotted key, with everything on the way made ready."""
        rest, path = key.split("."), _ROOT
        if not all(rest) or len(rest) > MAX_DEPTH:
            raise SpecError(self.error(place, f"{key!r} is not a dotted path such as train.steps"))
        while rest:
            self._open(path, place)
            part, rest = self._next(rest, path, place)
            path = (*path, part)
            if rest:
                self._make(path, place)
        return path

    def _next(self, rest: list[str], path: SpecPath, place: SourceLocation) -> tuple[str | int, list[str]]:
        """The next key, and what is left. Keys with dots are found where they exist, or name a change."""
        holder = self._at(path)
        if isinstance(holder, list):
            return self._index(holder, rest[0], path, place), rest[1:]
        for length in range(len(rest), 1, -1):
            if ".".join(rest[:length]) in holder:
                return ".".join(rest[:length]), rest[length:]
        whole = len(rest) if len(path) == 2 and path[0] == "variants" else 1
        return ".".join(rest[:whole]), rest[whole:]

    def _index(self, holder: list[Any], given: str, path: SpecPath, place: SourceLocation) -> int:
        if given.isdecimal() and int(given) < len(holder):
            return int(given)
        possible = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
        raise SpecError(self.error(place, f"no entry {given!r}; possible: {possible}", path))

    def _make(self, path: SpecPath, place: SourceLocation) -> None:
        """Put an empty mapping where there is no value yet."""
        holder = self._at(path[:-1])
        if isinstance(holder, dict) and path[-1] not in holder:
            holder[path[-1]] = {}
            self.places.keys[path] = place

    def _open(self, path: SpecPath, place: SourceLocation) -> None:
        """Make sure that something can be put under this path."""
        value = self._at(path)
        if isinstance(value, dict | list):
            return
        if value is not None and not (isinstance(value, str) and _holds_component(path)):
            raise SpecError(self.error(place, f"has nothing inside: it is {value!r}", path))
        self._at(path[:-1])[path[-1]] = {} if value is None else {"name": value}
        if value is not None:
            self.places.keys[*path, "name"] = self.places.values[*path, "name"] = self.places.value(path)


def _holds_component(path: SpecPath) -> bool:
    in_losses = len(path) == 2 and path[0] == "losses"
    return in_losses or (bool(path) and path[-1] in KINDS)
