"""Strict YAML: mappings, lists and plain scalars, every value with its place.

Built on PyYAML's event stream, so that size, depth, anchors, tags and duplicate keys are refused while
reading, before anything is constructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any

import yaml

from kava_core.errors import SpecError
from kava_core.specfile.reading.scalars import Scalar, parse_plain_scalar
from kava_core.specfile.reading.source_map import MAX_DEPTH, SourceLocation, SourceMap, SpecPath

MAX_BYTES = 1024 * 1024
"""Bytes of a spec."""


def read_spec_text(file: str | File) -> str:
    """The text of a spec file; SpecError where it is missing, a directory, too large, empty or not UTF-8."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SpecError(f"{file}: no such file") from error
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise SpecError(f"{file}: a spec has at most {MAX_BYTES} bytes; this file is larger")
    return _decode_text(data, file)


def parse_yaml(text: str, start: SourceLocation) -> tuple[Any, SourceMap]:
    """The document and the place of every key and value; SpecError at the first thing that is not allowed.

    In an override, whose place has no line, all values stand at ``start``.
    """
    reader = _EventReader(text, start)
    try:
        return reader.document(), reader.places
    except yaml.MarkedYAMLError as error:
        raise SpecError(reader.place(error.problem_mark).error(_syntax_message(error))) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise SpecError(
            reader.at(line, column).error(f"character U+{error.character:04X} is not allowed")
        ) from error


def _decode_text(data: bytes, file: str | File) -> str:
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
        self.places = SourceMap(start)

    def document(self) -> Any:
        """The only document."""
        next(self.events)
        begin = next(self.events)
        if isinstance(begin, yaml.StreamEndEvent):
            raise SpecError(f"{self.start}: there is nothing but comments")
        if begin.version or begin.tags:
            raise self.error(begin, "directives (%) are not allowed")
        value = self.node(next(self.events), ())
        next(self.events)
        more = next(self.events)
        if not isinstance(more, yaml.StreamEndEvent):
            raise self.error(more, "a second document is not allowed")
        return value

    def node(self, event: Any, path: SpecPath) -> Any:
        """The value that begins with this event."""
        self.refuse_special(event)
        self.places.values[path] = self.place(event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(path) >= MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} deep")
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def mapping(self, path: SpecPath) -> dict[str, Any]:
        """Keys are text, whatever they look like."""
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            if key in items:
                before = self.places.keys[*path, key]
                line = "" if before.line is None else f", first in line {before.line}"
                raise self.error(event, f"key {key!r} is given twice{line}")
            self.places.keys[*path, key] = self.place(event.start_mark)
            items[key] = self.node(next(self.events), (*path, key))
        return items

    def sequence(self, path: SpecPath) -> list[Any]:
        """Each entry's place is also the place of its index."""
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.places.keys[here] = self.place(event.start_mark)
            items.append(self.node(event, here))
        return items

    def key(self, event: Any) -> str:
        """A key, which must be a scalar."""
        self.refuse_special(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise self.error(event, "a key must be text, not a list or mapping")
        if event.value == "<<" and event.implicit[0]:
            raise self.error(event, "merge keys (<<) are not allowed")
        return str(self.checked(event, lambda: event.value))

    def scalar(self, event: Any) -> Scalar:
        """Quoted scalars are text; plain ones may be numbers, true, false or null."""
        return self.checked(
            event, lambda: parse_plain_scalar(event.value) if event.implicit[0] else str(event.value)
        )

    def checked(self, event: Any, value: Callable[[], Scalar]) -> Scalar:
        """``value()``; an error where it raises, or where the text holds half a surrogate pair."""
        try:
            event.value.encode("utf-8")
            return value()
        except UnicodeEncodeError as error:
            raise self.error(event, "half a surrogate pair is not a character") from error
        except ValueError as error:
            raise self.error(event, str(error)) from error

    def refuse_special(self, event: Any) -> None:
        """No anchors, aliases or tags."""
        if isinstance(event, yaml.AliasEvent):
            raise self.error(event, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if event.anchor is not None:
            raise self.error(event, f"anchors (&{event.anchor}) are not allowed; write the value out")
        if event.tag is not None:
            raise self.error(event, f"tags ({event.tag.replace('tag:yaml.org,2002:', '!!')}) are not allowed")

    def at(self, line: int, column: int) -> SourceLocation:
        """A place in this text."""
        return self.start if self.start.line is None else SourceLocation(self.start.source, line, column)

    def place(self, mark: Any) -> SourceLocation:
        """PyYAML's mark as a place."""
        return self.start if mark is None else self.at(mark.line + 1, mark.column + 1)

    def error(self, event: Any, message: str) -> SpecError:
        """An error at the start of an event."""
        return SpecError(self.place(event.start_mark).error(message))
