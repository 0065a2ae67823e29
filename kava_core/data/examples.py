"""An example, the text it becomes, and how a written answer is judged. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.specfile.sections.data import Template

ExampleField = Literal["prompt", "reasoning", "answer"]

FIELDS: tuple[ExampleField, ...] = ("prompt", "reasoning", "answer")
"""The fields of an example that become text, in the order of the text."""

_NUMBER = re.compile(r"([-+]?)\$?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\.?")


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
        """The example with one of its rationales as reasoning: 0 is its own; counted round after the last."""
        every = (self.reasoning, *self.rationales)
        return replace(self, reasoning=every[rationale % len(every)])


@dataclass(frozen=True)
class Text:
    """An example as one string."""

    text: str
    bounds: tuple[int, int, int, int]
    """``(0, p, r, a)``: prompt is ``text[:p]``, reasoning ``text[p:r]``, answer ``text[r:a]``, the rest."""
    answer_start: int
    """Where in the answer's part the example's own answer begins, after the template's marker."""

    @property
    def prompt(self) -> str:
        """The part that is given."""
        return self.text[: self.bounds[1]]


def render_example(example: Example, template: Template) -> Text:
    """The example's text. Only the field's own braces are filled in; all others are text."""
    prompt, reasoning, answer = (
        getattr(template, field).replace("{" + field + "}", getattr(example, field)) for field in FIELDS
    )
    text = prompt + reasoning + answer
    value = len(text) - len(answer) + template.answer.index("{answer}")
    return Text(text, (0, len(prompt), len(prompt) + len(reasoning), len(text)), value)


def split_completion(example: Example, written: str, template: Template) -> Text:
    """A completion that was written for an example, with its answer's part found by the marker.

    Without a marker all of it is reasoning.
    """
    prompt = template.prompt.replace("{prompt}", example.prompt)
    start, end = (
        len(prompt) + place for place in find_answer_marker(written, template) or (len(written),) * 2
    )
    text = prompt + written
    return Text(text, (0, len(prompt), start, len(text)), end)


def find_answer_marker(written: str, template: Template) -> tuple[int, int] | None:
    """Where the answer's marker begins and ends; None where it is missing.

    White space around it counts if it is there, but many tokenizers do not give it back.
    """
    whole = template.answer.partition("{answer}")[0]
    for marker in (whole, whole.strip()):
        if marker and (place := written.find(marker)) >= 0:
            return place, place + len(marker)
    return None


def split_steps(reasoning: str, separator: str) -> list[str]:
    """The steps between the separators, blank ones left out."""
    return [step for step in reasoning.split(separator) if step.strip()]


def drop_last_step(example: Example, separator: str) -> Example:
    """The example with its reasoning up to the end of the last step but one; other rationales stay whole."""
    pieces = example.reasoning.split(separator)
    steps = [place for place, piece in enumerate(pieces) if piece.strip()]
    kept = pieces[: steps[-2] + 1] if len(steps) > 1 else []
    return replace(example, reasoning=separator.join(kept))


def join_steps(steps: Sequence[str], separator: str, where: str) -> str:
    """The steps as one text; SpecError where one holds the separator, for it could not be told from two."""
    for step in steps:
        if separator in step:
            raise SpecError(
                f"{where}: the step {shorten_to_end(step)!r} holds the separator {separator!r}; "
                "set another data.separator"
            )
    return separator.join(steps)


def shorten_to_end(text: str, width: int = 30) -> str:
    """The text's end, for a message."""
    return text if len(text) <= width else "…" + text[-width:]


def example_from_fields(
    record: Mapping[str, Any],
    where: str,
    columns: Mapping[ExampleField, str] | None = None,
    *,
    separator: str = "\n",
) -> Example:
    """The example in a record with prompt, reasoning, answer and perhaps task and rationales.

    ``columns`` names the record's key for a field where the two differ. A reasoning that is a list of steps
    is joined by ``separator``. SpecError, opening with ``where``, for a key that is missing, a value that is
    not text, an empty prompt or answer, and a step that holds the separator.
    """
    names = {field: (columns or {}).get(field, field) for field in FIELDS}
    prompt, answer = (read_text_field(record, names[field], where) for field in ("prompt", "answer"))
    reasoning = _read_reasoning(record, names["reasoning"], where, separator)
    task = read_text_field(record, "task", where) if record.get("task") is not None else None
    return Example(prompt, reasoning, answer, task, _read_rationales(record, where))


def _read_reasoning(record: Mapping[str, Any], key: str, where: str, separator: str) -> str:
    """A text, or a list of steps."""
    if not isinstance(record.get(key), list):
        return read_text_field(record, key, where, empty=True)
    named = {f"{key}[{place}]": step for place, step in enumerate(record[key])}
    return join_steps([read_text_field(named, step, where, empty=True) for step in named], separator, where)


def _read_rationales(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = record.get("rationales") or []
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SpecError(f"{where}: field 'rationales' must be a list of strings, not {type(given).__name__}")
    named = {f"rationales[{place}]": text for place, text in enumerate(given)}
    return tuple(read_text_field(named, key, where, empty=True) for key in named)


def read_text_field(record: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    """``record[key]``: text that UTF-8 can write, and not empty unless that is allowed; else SpecError."""
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


def extract_answer(generated: str, template: Template, lines: int = 1) -> str | None:
    """What stands after the first marker, up to the end of the line (or of ``lines`` lines), stripped.

    The marker is the template's text before ``{answer}``, without the white space around it, because many
    tokenizers do not give that back. None where the marker is missing. SpecError where the template has no
    marker, for then an answer cannot be told from the reasoning.
    """
    before, _, after = template.answer.partition("{answer}")
    marker = before.strip()
    if not marker:
        raise SpecError(
            f"data.template.answer: {template.answer!r} has no marker before {{answer}} to look for"
        )
    _, found, rest = generated.partition(marker)
    if not found:
        return None
    kept = "\n".join(rest.strip().splitlines()[:lines])
    return kept.strip().removesuffix(after.strip()).strip()


def is_correct(generated: str, example: Example, template: Template) -> bool:
    """Whether the written answer is the example's: the same text, or the same number.

    Numbers are compared without thousands commas, a leading ``$`` and a trailing period, as is usual for
    GSM8K (arXiv 2110.14168).
    """
    gold = example.answer.strip()
    given = extract_answer(generated, template, lines=max(1, len(gold.splitlines())))
    if given is None:
        return False
    number = _parse_number(given)
    return given == gold or (number is not None and number == _parse_number(gold))


def _parse_number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip().replace(",", ""))
    return Decimal(match[1] + match[2]) if match else None
