"""Define an example, the text it becomes, and what of a written text is its answer. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from kava_core.data.answers import is_right_answer
from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.specfile.sections.data import Template

ExampleField = Literal["prompt", "reasoning", "answer"]

FIELDS: tuple[ExampleField, ...] = ("prompt", "reasoning", "answer")
"""The fields of an example that become text, in the order of the text."""


@dataclass(frozen=True)
class Example:
    """One task: what is given, the written steps, the answer, and optionally a label of the kind of task."""

    prompt: str
    reasoning: str
    answer: str
    task: str | None = None
    rationales: tuple[str, ...] = ()
    """Other written steps to the same answer, for teachers that read another rationale than the student."""

    def with_rationale(self, rationale: int) -> Example:
        """Return the example with one of its rationales as reasoning.

        Rationale 0 is its own reasoning; after the last one counting starts again.
        """
        rationales = (self.reasoning, *self.rationales)
        return replace(self, reasoning=rationales[rationale % len(rationales)])


class Part(NamedTuple):
    """A part of a text, or a text without its segments."""

    text: str
    from_data: tuple[tuple[int, int], ...] = ()
    """As in ``Text``."""


@dataclass(frozen=True)
class Text:
    """An example as one string."""

    text: str
    bounds: tuple[int, int, int, int]
    """``(0, p, r, a)``, in characters: prompt is ``text[:p]``, reasoning ``text[p:r]``, answer
    ``text[r:a]``."""
    answer_start: int
    """The character with which the example's own answer begins, after the template's marker."""
    from_data: tuple[tuple[int, int], ...] = ()
    """Ranges of characters that are the data's own: special tokens in them are read as any other text."""

    @property
    def whole(self) -> Part:
        """Return the text without its segments."""
        return Part(self.text, self.from_data)

    @property
    def prompt_part(self) -> Part:
        """Return the part that is given."""
        return self.part(0, self.bounds[1])

    def part(self, begin: int, end: int) -> Part:
        """Return a range of characters, with what of it is the data's own."""
        ranges = [(max(first, begin) - begin, min(last, end) - begin) for first, last in self.from_data]
        return Part(self.text[begin:end], tuple(one for one in ranges if one[0] < one[1]))


def render_example(example: Example, template: Template) -> Text:
    """Return the example's text. Only the field's own braces are filled in; all others are text."""
    prompt = template.prompt.replace("{prompt}", example.prompt)
    reasoning = template.reasoning.replace("{reasoning}", example.reasoning)
    answer = template.answer.replace("{answer}", example.answer)
    text = prompt + reasoning + answer
    reasoning_end = len(prompt) + len(reasoning)
    prompt_start = template.prompt.index("{prompt}")
    reasoning_start = len(prompt) + template.reasoning.index("{reasoning}")
    answer_start = reasoning_end + template.answer.index("{answer}")
    from_data = (
        (prompt_start, prompt_start + len(example.prompt)),
        (reasoning_start, reasoning_start + len(example.reasoning)),
        (answer_start, answer_start + len(example.answer)),
    )
    return Text(text, (0, len(prompt), reasoning_end, len(text)), answer_start, from_data)


def split_completion(example: Example, written: str, template: Template) -> Text:
    """Return the text of a completion that was written for an example; its answer is found by the marker.

    Without a marker all of it is reasoning. Special tokens in it were written as such.
    """
    prompt = template.prompt.replace("{prompt}", example.prompt)
    marker_start, marker_end = find_answer_marker(written, template) or (len(written), len(written))
    text = prompt + written
    bounds = (0, len(prompt), len(prompt) + marker_start, len(text))
    prompt_start = template.prompt.index("{prompt}")
    from_data = ((prompt_start, prompt_start + len(example.prompt)),)
    return Text(text, bounds, len(prompt) + marker_end, from_data)


def find_answer_marker(written: str, template: Template) -> tuple[int, int] | None:
    """Return where the answer's marker begins and ends, in characters; None if it is missing.

    White space around the marker belongs to it if it is there, but many tokenizers do not give it back.
    """
    whole_marker = template.answer.partition("{answer}")[0]
    for marker in (whole_marker, whole_marker.strip()):
        start = written.find(marker)
        if marker and start >= 0:
            return start, start + len(marker)
    return None


def split_steps(reasoning: str, separator: str) -> list[str]:
    """Split a reasoning into its steps; blank ones are left out."""
    return [step for step in reasoning.split(separator) if step.strip()]


def drop_last_step(example: Example, separator: str) -> Example:
    """Drop the last step of the example's reasoning, up to the end of the step before it.

    Its other rationales stay whole.
    """
    pieces = example.reasoning.split(separator)
    step_indexes = [index for index, piece in enumerate(pieces) if piece.strip()]
    kept = pieces[: step_indexes[-2] + 1] if len(step_indexes) > 1 else []
    return replace(example, reasoning=separator.join(kept))


def join_steps(steps: Sequence[str], separator: str, where: str) -> str:
    """Join steps to one text.

    Raises:
        SpecError: a step contains the separator, so that it would later be read as two.
    """
    for step in steps:
        if separator in step:
            raise SpecError(
                f"{where}: the step {shorten_to_end(step)!r} holds the separator {separator!r}; "
                "set another data.separator"
            )
    return separator.join(steps)


def shorten_to_end(text: str, width: int = 30) -> str:
    """Cut a text to its end, for a message."""
    return text if len(text) <= width else "…" + text[-width:]


def example_from_fields(
    record: Mapping[str, Any],
    where: str,
    columns: Mapping[ExampleField, str] | None = None,
    *,
    separator: str = "\n",
) -> Example:
    """Return the example in a record with prompt, reasoning, answer and perhaps task and rationales.

    Args:
        record: the fields by key. A reasoning may be a text or a list of steps.
        where: names the record in errors, such as ``file:line``.
        columns: the record's key for each field whose key differs from its name.
        separator: text that a list of steps is joined by.

    Raises:
        SpecError: a key is missing, a value is not text, prompt or answer is empty, or a step contains the
            separator.
    """
    names = {field: (columns or {}).get(field, field) for field in FIELDS}
    prompt = read_text_field(record, names["prompt"], where)
    answer = read_text_field(record, names["answer"], where)
    reasoning = _read_reasoning(record, names["reasoning"], where, separator)
    task = read_text_field(record, "task", where) if record.get("task") is not None else None
    return Example(prompt, reasoning, answer, task, _read_rationales(record, where))


def _read_reasoning(record: Mapping[str, Any], key: str, where: str, separator: str) -> str:
    """Read a text, or a list of steps."""
    if not isinstance(record.get(key), list):
        return read_text_field(record, key, where, empty=True)
    return join_steps(_read_texts(record[key], key, where), separator, where)


def _read_rationales(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = record.get("rationales") or []
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SpecError(f"{where}: field 'rationales' must be a list of strings, not {type(given).__name__}")
    return tuple(_read_texts(given, "rationales", where))


def _read_texts(entries: Sequence[Any], key: str, where: str) -> list[str]:
    """Read the entries of a list, which errors call ``key[0]``, ``key[1]`` and so on."""
    named = {f"{key}[{index}]": entry for index, entry in enumerate(entries)}
    return [read_text_field(named, name, where, empty=True) for name in named]


def read_text_field(record: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    """Return ``record[key]``.

    Raises:
        SpecError: there is no such key, the value is not text, UTF-8 cannot write it, or it is empty though
            ``empty`` is false.
    """
    if key not in record:
        raise SpecError(f"{where}: no field {key!r} among {one_of(record)}{did_you_mean(key, record)}")
    value = record[key]
    if not isinstance(value, str):
        raise SpecError(f"{where}: field {key!r} must be a string, not {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise SpecError(f"{where}: field {key!r} holds half of a surrogate pair, which is no character")
    if not empty and not value.strip():
        raise SpecError(f"{where}: field {key!r} is empty")
    return value


def answer_frame(template: Template) -> tuple[str, str]:
    """Return the texts that a template has before and behind an answer; the first is its marker.

    Raises:
        SpecError: there is no marker, so that an answer cannot be distinguished from the reasoning.
    """
    marker, _, behind = template.answer.partition("{answer}")
    if not marker.strip():
        raise SpecError(
            f"data.template.answer: {template.answer!r} has no marker before {{answer}} to look for"
        )
    return marker, behind


def is_correct(written: str, example: Example, template: Template) -> bool:
    """Return whether the written answer is the example's: the same text, or the same number.

    Raises:
        SpecError: the template has no marker.
    """
    marker, behind = answer_frame(template)
    return is_right_answer(written, example.answer, marker, behind)
