"""Keep where each value of a spec was written, for errors that name the line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kava_core.errors import SpecError

SpecPath = tuple[str | int, ...]
"""Keys and list indexes from the root of a spec to a value, such as ``("losses", 0, "weight")``."""


MAX_DEPTH = 50
"""Most mappings and lists inside one another, and most parts of a dotted path."""


def dotted_path(path: SpecPath) -> str:
    """Return a path as it is written on the command line: ``teachers.0.name``."""
    return ".".join(str(part) for part in path)


class InvalidSpecError(SpecError):
    """Everything that is wrong with a spec, one line each."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(dict.fromkeys(lines))
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class SourceLocation:
    """A position in a spec file, or a command-line override."""

    source: str
    """The file as the user named it, or ``override KEY=VALUE``."""
    line: int | None = None
    """Line number from 1; None for an override."""
    column: int | None = None
    """Column number from 1; None for an override."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"

    @property
    def origin(self) -> str:
        """Return ``file:line``, or ``override``."""
        return "override" if self.line is None else f"{self.source}:{self.line}"

    def error_text(self, message: str, path: SpecPath = ()) -> str:
        """Return the line of an error: ``location: path: message``."""
        named_path = f"{dotted_path(path)}: " if path else ""
        return f"{self}: {named_path}{message}"


@dataclass
class SourceMap:
    """The locations of all keys and values of a document."""

    start: SourceLocation
    """Location of the document itself, for paths that are not in it."""
    keys: dict[SpecPath, SourceLocation] = field(default_factory=dict)
    values: dict[SpecPath, SourceLocation] = field(default_factory=dict)

    def key_location(self, path: SpecPath) -> SourceLocation:
        """Return the location of a key, or of the nearest key around it."""
        while path and path not in self.keys:
            path = path[:-1]
        return self.keys.get(path, self.start)

    def value_location(self, path: SpecPath) -> SourceLocation:
        """Return the location of a value, or of the nearest key around it."""
        return self.values.get(path) or self.key_location(path)

    def forget_path(self, path: SpecPath) -> None:
        """Remove a path and everything below it."""
        for locations in (self.keys, self.values):
            below = [other for other in locations if other[: len(path)] == path]
            for other in below:
                del locations[other]

    def part_below(self, path: SpecPath) -> SourceMap:
        """Return the locations from a path down, as a map whose root is that path."""
        part = SourceMap(self.key_location(path))
        for mine, theirs in ((self.keys, part.keys), (self.values, part.values)):
            for other, location in mine.items():
                if other[: len(path)] == path:
                    theirs[other[len(path) :]] = location
        return part

    def insert_below(self, path: SpecPath, part: SourceMap) -> None:
        """Insert a map at a path: the opposite of ``part_below``."""
        self.keys[path] = self.values[path] = part.start
        for mine, theirs in ((self.keys, part.keys), (self.values, part.values)):
            for rest, location in theirs.items():
                mine[(*path, *rest)] = location

    def copy(self) -> SourceMap:
        """Return an independent copy."""
        return SourceMap(self.start, dict(self.keys), dict(self.values))
