"""Batches: every side's tokens of the same examples, padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from kava_core.data.encode import NO_LABEL, EncodedText, LossOn, encode_texts, prompt_ids
from kava_core.data.examples import Example, Text, drop_last_step, render_example
from kava_core.errors import SpecError
from kava_core.protocols.timeline import NOWHERE
from kava_core.specfile.sections.data import Template

Side = dict[str, Any]
"""``input_ids``, ``attention_mask``, ``segments``: [batch, time]; ``spans``: [batch, time, 2]. The student's
has ``labels`` as well and, where examples have them, ``tasks``: the label of each one's kind of task."""


@dataclass(frozen=True)
class EncodedExample:
    """One example in the tokens of every side."""

    example: Example
    student: Any
    """``EncodedText``, or what another trajectory makes of it; its length counts all tokens."""
    teachers: dict[str, EncodedText]


@dataclass(frozen=True)
class Reading:
    """The text that a teacher reads, where it is not the student's."""

    template: Template
    rationale: int = 0
    """Which of an example's rationales; 0 is the student's."""
    last_step: bool = True
    """Whether the last written step is there."""


class Collator:
    """Examples, or items encoded before, to one batch. Every side tokenizes the same text by itself.

    A teacher with a ``Reading`` has a text of its own, of the same example.

    With ``shuffle_teacher`` row i of every teacher is the text of example i + 1 of the batch (the last row's
    is the first): its own text, tokens and segments, but beside another student.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase],
        template: Template,
        loss_on: LossOn = "completion",
        shuffle_teacher: bool = False,
        *,
        max_length: int | None = None,
        pad_to_multiple: int = 1,
        readings: Mapping[str, Reading] | None = None,
        separator: str = "\n",
    ) -> None:
        self.separator = separator
        self.readings = dict(readings or {})
        self.student_tokenizer = student_tokenizer
        self.teacher_tokenizers = dict(teacher_tokenizers)
        self.template = template
        self.loss_on = loss_on
        self.shuffle_teacher = shuffle_teacher
        self.max_length = max_length
        self.pad_to_multiple = pad_to_multiple

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample | None]:
        """Every example in all tokenizers; None where it is longer than ``max_length`` in any of them."""
        student = self.encode_student(examples)
        teachers = [
            encode_texts(self._texts(examples, name), tokenizer, **self._rules)
            for name, tokenizer in self.teacher_tokenizers.items()
        ]
        return [self._item(*sides) for sides in zip(examples, student, *teachers, strict=True)]

    def encode_student(self, examples: Sequence[Example]) -> list[Any]:
        """The student's side of every example; None where it is too long."""
        return list(encode_texts(self._texts(examples, None), self.student_tokenizer, **self._rules))

    def encode_written(
        self, examples: Sequence[Example], texts: Sequence[Text]
    ) -> list[EncodedExample | None]:
        """Texts that someone wrote for these examples, read by every side; None where one is too long."""
        tokenizers = (self.student_tokenizer, *self.teacher_tokenizers.values())
        sides = [encode_texts(texts, tokenizer, **self._rules) for tokenizer in tokenizers]
        return [self._item(*row) for row in zip(examples, *sides, strict=True)]

    @staticmethod
    def unlabelled(item: EncodedExample) -> EncodedExample:
        """The item without cross-entropy."""
        student = item.student
        return replace(item, student=replace(student, labels=torch.full_like(student.labels, NO_LABEL)))

    @property
    def _rules(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "loss_on": self.loss_on}

    def student_side(self, rows: Sequence[Any]) -> Side:
        """The student's tensors, with labels."""
        side = self._side(rows, self.student_tokenizer)
        return side | {"labels": self._pad([row.labels for row in rows], NO_LABEL)}

    def teacher_side(self, rows: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> Side:
        """The tensors of a teacher."""
        return self._side(rows, tokenizer)

    def __call__(self, batch: Sequence[Example | EncodedExample]) -> dict[str, Any]:
        """``{"student": Side with labels and tasks, "teachers": {name: Side}, "labels": …}``, padded right.

        The labels stand at the top as well because ``transformers.Trainer`` counts them there.

        Raises:
            SpecError: an example that is not yet encoded is too long; one example with ``shuffle_teacher``.
        """
        items = self._items(batch)
        student = self.student_side([item.student for item in items])
        if any(item.example.task for item in items):
            student["tasks"] = tuple(item.example.task or "" for item in items)
        beside = self._rotated(items)
        teachers = {
            name: self.teacher_side([item.teachers[name] for item in beside], tokenizer)
            for name, tokenizer in self.teacher_tokenizers.items()
        }
        return {"student": student, "teachers": teachers, "labels": student["labels"]}

    def prompts(self, batch: Sequence[Example | EncodedExample]) -> tuple[Side, list[str]]:
        """``input_ids`` and ``attention_mask`` of the prompts, padded left for generation, and the answers.

        The prompt is tokenized by itself: see ``kava_core.data.encode.count_prefix_mismatches``.
        """
        examples = [entry.example if isinstance(entry, EncodedExample) else entry for entry in batch]
        texts = [render_example(example, self.template).prompt for example in examples]
        rows = prompt_ids(texts, self.student_tokenizer)
        if empty := [text for text, row in zip(texts, rows, strict=True) if not len(row)]:
            raise SpecError(f"data: the student's tokenizer makes no tokens of the prompt {empty[0]!r}")
        padded, mask = pad_left(rows, pad_id(self.student_tokenizer))
        return {"input_ids": padded, "attention_mask": mask}, [example.answer for example in examples]

    def _texts(self, examples: Sequence[Example], teacher: str | None) -> list[Text]:
        reading = self.readings.get(teacher or "", Reading(self.template))
        told = [example.with_rationale(reading.rationale) for example in examples]
        if not reading.last_step:
            told = [drop_last_step(example, self.separator) for example in told]
        return [render_example(example, reading.template) for example in told]

    def _item(self, example: Example, student: Any, *teachers: EncodedText | None) -> EncodedExample | None:
        """The item, or None where a side is too long."""
        fitting = [side for side in teachers if side is not None]
        if student is None or len(fitting) < len(teachers):
            return None
        return EncodedExample(example, student, dict(zip(self.teacher_tokenizers, fitting, strict=True)))

    def _items(self, batch: Sequence[Example | EncodedExample]) -> list[EncodedExample]:
        encoded = iter(self.encode([entry for entry in batch if isinstance(entry, Example)]))
        items = [next(encoded) if isinstance(entry, Example) else entry for entry in batch]
        fitting = [item for item in items if item is not None]
        if len(fitting) < len(items):
            raise SpecError(f"data: an example is longer than max_length={self.max_length} tokens")
        return fitting

    def _rotated(self, items: list[EncodedExample]) -> list[EncodedExample]:
        if not self.shuffle_teacher:
            return items
        if len(items) < 2:
            raise SpecError("train.shuffle_teacher: needs batches of at least 2 examples, not 1")
        return items[1:] + items[:1]

    def _side(self, rows: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> Side:
        segments = self._pad([row.segments for row in rows], NOWHERE)
        return {
            "input_ids": self._pad([row.input_ids for row in rows], pad_id(tokenizer)),
            "attention_mask": (segments != NOWHERE).long(),
            "segments": segments,
            "spans": self._pad([row.spans for row in rows], 0),
        }

    def _pad(self, rows: list[Tensor], value: int) -> Int[Tensor, "batch time ..."]:
        """Rows padded right to one length, a multiple of ``pad_to_multiple``."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple
        return F.pad(padded, (0, 0) * (padded.dim() - 2) + (0, missing), value=value)


def pad_left(rows: Sequence[Int[Tensor, " _"]], value: int) -> tuple[Tensor, Tensor]:
    """Tokens ``batch time`` that all end in the last column, for writing on from them, and their mask."""
    left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    mask = pad_sequence([torch.ones_like(row) for row in rows], **left)
    return pad_sequence(list(rows), padding_value=value, **left), mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands at padding: the pad token, else EOS, else 0. Only masks say where padding is."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
