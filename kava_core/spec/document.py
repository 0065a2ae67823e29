"""A spec as it was written: plain values and where they stand. Changes are made before validation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from kava_core.errors import SpecError
from kava_core.hookspecs import KINDS
from kava_core.spec.places import DEEPEST, Path, Place, Places

_ROOT: Path = ()


@dataclass
class Document:
    """Values and places; ``set`` changes both."""

    data: Any
    places: Places

    def copy(self) -> Document:
        """An independent copy."""
        return Document(deepcopy(self.data), self.places.copy())

    def set(self, key: str, value: Any, place: Place, inner: Places | None = None) -> None:
        """Put a value at a dotted path; ``inner`` has the places of what is inside it.

        SpecError where the path leads through something that is neither mapping nor list, or past a list's
        end. Mappings that are missing or null are made; a component's bare name becomes a mapping with it.
        """
        path = self._prepare(key, place)
        holder = self._at(path[:-1])
        holder[path[-1]] = value
        self.places.forget(path)
        self.places.keys[path] = self.places.values[path] = place
        for name in ("keys", "values") if inner else ():
            below = {(*path, *rest): where for rest, where in getattr(inner, name).items() if rest}
            getattr(self.places, name).update(below)

    def _at(self, path: Path) -> Any:
        value = self.data
        for part in path:
            value = value[part]
        return value

    def _prepare(self, key: str, place: Place) -> Path:
        """The path of a dotted key, with everything on the way made ready."""
        rest, path = key.split("."), _ROOT
        if not all(rest) or len(rest) > DEEPEST:
            raise SpecError(place.error(f"{key!r} is not a dotted path such as train.steps"))
        while rest:
            self._open(path, place)
            part, rest = _next(self._at(path), rest, path, place)
            path = (*path, part)
            if rest and isinstance(self._at(path[:-1]), dict):
                self._at(path[:-1]).setdefault(part, {})
        return path

    def _open(self, path: Path, place: Place) -> None:
        """Make sure that something can be put under this path."""
        value = self._at(path)
        if isinstance(value, dict | list):
            return
        if value is not None and not (isinstance(value, str) and _holds_component(path)):
            raise SpecError(place.error(f"has nothing inside: it is {value!r}", path))
        self._at(path[:-1])[path[-1]] = {} if value is None else {"name": value}
        if value is not None:
            self.places.keys[*path, "name"] = self.places.values[*path, "name"] = self.places.value(path)


def _next(holder: Any, rest: list[str], path: Path, place: Place) -> tuple[str | int, list[str]]:
    """The next key, and what is left. Keys that contain dots are found when they exist, or name a change."""
    if isinstance(holder, list):
        return _index(holder, rest[0], path, place), rest[1:]
    for length in range(len(rest), 1, -1):
        if ".".join(rest[:length]) in holder:
            return ".".join(rest[:length]), rest[length:]
    whole = len(rest) if len(path) == 2 and path[0] == "variants" else 1
    return ".".join(rest[:whole]), rest[whole:]


def _index(holder: list[Any], given: str, path: Path, place: Place) -> int:
    if given.isdecimal() and int(given) < len(holder):
        return int(given)
    possible = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
    raise SpecError(place.error(f"no entry {given!r}; possible: {possible}", path))


def _holds_component(path: Path) -> bool:
    in_losses = len(path) == 2 and path[0] == "losses"
    return in_losses or (bool(path) and path[-1] in KINDS)
