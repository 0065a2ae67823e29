"""Read strict YAML: mappings, lists and plain scalars, every value with its location.

Built on PyYAML's event stream, so that size, depth, anchors, tags and duplicate keys are refused while
reading, before anything is constructed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kava_core.errors import SpecError
from kava_core.specfile.reading.scalars import Scalar, parse_plain_scalar
from kava_core.specfile.reading.source_map import MAX_DEPTH, SourceLocation, SourceMap, SpecPath

MAX_BYTES = 1024 * 1024
"""Largest size of a spec file, in bytes."""


def read_spec_text(file: str | Path) -> str:
    """Return the text of a spec file.

    Raises:
        SpecError: it is missing, a directory, too large, empty or not UTF-8.
    """
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SpecError(f"{file}: no such file") from error
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise SpecError(f"{str(file)!r}: cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise SpecError(f"{file}: a spec has at most {MAX_BYTES} bytes; this file is larger")
    return _decode_text(data, file)


def parse_yaml(text: str, start: SourceLocation) -> tuple[Any, SourceMap]:
    """Return a document and the locations of its keys and values.

    Args:
        text: the YAML.
        start: location of its first character; in an override, which has no line, all values are there.

    Raises:
        SpecError: at the first thing that is not allowed.
    """
    reader = _EventReader(text, start)
    try:
        return reader.read_document(), reader.locations
    except yaml.MarkedYAMLError as error:
        location = reader.location_of_mark(error.problem_mark)
        raise SpecError(location.error_text(_syntax_message(error))) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        message = f"character U+{error.character:04X} is not allowed"
        raise SpecError(reader.location_at(line, column).error_text(message)) from error


def _decode_text(data: bytes, file: str | Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{file}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error
    if not text.strip():
        raise SpecError(f"{file}: the file is empty")
    return text


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem).replace("<block end>", "the end of the block")
    problem = problem.replace("'<block mapping start>'", "deeper indentation")
    problem = problem.replace("'<stream end>'", "the end").replace(repr("\0"), "the end")
    hint = "; check the indentation" if "block" in f"{error.context} {problem}" else ""
    return f"not valid YAML: {problem}{hint}"


class _EventReader:
    """One pass over the events of a document."""

    def __init__(self, text: str, start: SourceLocation) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.start = start
        self.locations = SourceMap(start)

    def read_document(self) -> Any:
        """Read the only document."""
        next(self.events)
        begin = next(self.events)
        if isinstance(begin, yaml.StreamEndEvent):
            raise SpecError(f"{self.start}: there is nothing but comments")
        if begin.version or begin.tags:
            raise self.error_at(begin, "directives (%) are not allowed")
        value = self.read_node(next(self.events), ())
        next(self.events)
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.error_at(after, "a second document is not allowed")
        return value

    def read_node(self, event: Any, path: SpecPath) -> Any:
        """Read the value that begins with this event."""
        self.refuse_special(event)
        self.locations.values[path] = self.location_of_mark(event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            return self.read_scalar(event)
        if len(path) >= MAX_DEPTH:
            raise self.error_at(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.MappingStartEvent):
            return self.read_mapping(path)
        return self.read_sequence(path)

    def read_mapping(self, path: SpecPath) -> dict[str, Any]:
        """Read a mapping up to its end. Keys are text, even if they look like numbers."""
        items: dict[str, Any] = {}
        event = next(self.events)
        while not isinstance(event, yaml.MappingEndEvent):
            key = self.read_key(event)
            if key in items:
                first = self.locations.keys[*path, key]
                line = "" if first.line is None else f", first in line {first.line}"
                raise self.error_at(event, f"key {key!r} is given twice{line}")
            self.locations.keys[*path, key] = self.location_of_mark(event.start_mark)
            items[key] = self.read_node(next(self.events), (*path, key))
            event = next(self.events)
        return items

    def read_sequence(self, path: SpecPath) -> list[Any]:
        """Read a list up to its end. An entry's location is also that of its index."""
        items: list[Any] = []
        event = next(self.events)
        while not isinstance(event, yaml.SequenceEndEvent):
            entry_path = (*path, len(items))
            self.locations.keys[entry_path] = self.location_of_mark(event.start_mark)
            items.append(self.read_node(event, entry_path))
            event = next(self.events)
        return items

    def read_key(self, event: Any) -> str:
        """Read a key, which must be a scalar."""
        self.refuse_special(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise self.error_at(event, "a key must be text, not a list or mapping")
        if event.value == "<<" and event.implicit[0]:
            raise self.error_at(event, "merge keys (<<) are not allowed")
        return self.checked_text(event)

    def read_scalar(self, event: Any) -> Scalar:
        """Read a scalar: text if it is quoted, else perhaps a number, true, false or null."""
        text = self.checked_text(event)
        if not event.implicit[0]:
            return text
        try:
            return parse_plain_scalar(text)
        except ValueError as error:
            raise self.error_at(event, str(error)) from error

    def checked_text(self, event: Any) -> str:
        """Return the text of a scalar, which must contain neither half a surrogate pair nor NUL."""
        text = str(event.value)
        if "\0" in text:
            raise self.error_at(event, "a NUL character is not allowed")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error_at(event, "half a surrogate pair is not a character") from error
        return text

    def refuse_special(self, event: Any) -> None:
        """Refuse anchors, aliases and tags."""
        if isinstance(event, yaml.AliasEvent):
            raise self.error_at(event, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if event.anchor is not None:
            raise self.error_at(event, f"anchors (&{event.anchor}) are not allowed; write the value out")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.error_at(event, f"tags ({tag}) are not allowed")

    def location_at(self, line: int, column: int) -> SourceLocation:
        """Return a location in this text."""
        if self.start.line is None:
            return self.start
        return SourceLocation(self.start.source, line, column)

    def location_of_mark(self, mark: Any) -> SourceLocation:
        """Return the location of PyYAML's mark, which counts from 0."""
        return self.start if mark is None else self.location_at(mark.line + 1, mark.column + 1)

    def error_at(self, event: Any, message: str) -> SpecError:
        """Make an error at the start of an event."""
        return SpecError(self.location_of_mark(event.start_mark).error_text(message))
