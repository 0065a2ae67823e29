"""Where each value of a spec was written, and errors that say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kava_core.errors import SpecError

SpecPath = tuple[str | int, ...]
"""Keys and list indexes from the root of a spec to a value."""


MAX_DEPTH = 50
"""Mappings and lists inside one another, and parts of a dotted path."""


def dotted_path(path: SpecPath) -> str:
    """``teachers.0.name``, as on the command line."""
    return ".".join(str(part) for part in path)


class InvalidSpecError(SpecError):
    """Everything wrong with a spec, one line each."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(dict.fromkeys(lines))
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class SourceLocation:
    """One spot in a spec file, or a command-line override."""

    source: str
    """File as the user named it, or ``override KEY=VALUE``."""
    line: int | None = None
    """Counted from 1; None for an override."""
    column: int | None = None
    """Counted from 1; None for an override."""

    def __str__(self) -> str:
        spot = "" if self.line is None else f":{self.line}:{self.column}"
        return f"{self.source}{spot}"

    @property
    def origin(self) -> str:
        """``file:line``, or ``override``."""
        return "override" if self.line is None else f"{self.source}:{self.line}"

    def error(self, message: str, path: SpecPath = ()) -> str:
        """``place: path: message``."""
        where = f"{dotted_path(path)}: " if path else ""
        return f"{self}: {where}{message}"


@dataclass
class SourceMap:
    """The place of every key and value."""

    start: SourceLocation
    keys: dict[SpecPath, SourceLocation] = field(default_factory=dict)
    values: dict[SpecPath, SourceLocation] = field(default_factory=dict)

    def key(self, path: SpecPath) -> SourceLocation:
        """Where the key stands, or the nearest enclosing one."""
        return self._nearest(self.keys, path)

    def value(self, path: SpecPath) -> SourceLocation:
        """Where the value stands, or else the nearest enclosing key."""
        return self.values.get(path) or self.key(path)

    def forget(self, path: SpecPath) -> None:
        """Drop this path and everything below it."""
        for places in (self.keys, self.values):
            for old in [old for old in places if old[: len(path)] == path]:
                del places[old]

    def below(self, path: SpecPath) -> SourceMap:
        """The places from this path down, counted from it."""
        below = SourceMap(self.key(path))
        for mine, theirs in ((self.keys, below.keys), (self.values, below.values)):
            theirs |= {full[len(path) :]: place for full, place in mine.items() if full[: len(path)] == path}
        return below

    def graft(self, path: SpecPath, below: SourceMap) -> None:
        """The opposite of ``below``: these places become those from this path down."""
        self.keys[path] = self.values[path] = below.start
        for mine, theirs in ((self.keys, below.keys), (self.values, below.values)):
            mine |= {(*path, *rest): place for rest, place in theirs.items()}

    def copy(self) -> SourceMap:
        """An independent copy."""
        return SourceMap(self.start, dict(self.keys), dict(self.values))

    def _nearest(self, places: dict[SpecPath, SourceLocation], path: SpecPath) -> SourceLocation:
        while path and path not in places:
            path = path[:-1]
        return places.get(path, self.start)
