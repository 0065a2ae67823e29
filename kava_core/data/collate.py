"""Collate batches: every side's tokens of the same examples, padded."""

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

from kava_core.data.encoding.encode import NO_LABEL, EncodedText, LossOn, encode_texts, prompt_ids
from kava_core.data.examples import Example, Text, drop_last_step, render_example
from kava_core.errors import SpecError
from kava_core.protocols.timeline import NOWHERE
from kava_core.specfile.sections.data import Template

Side = dict[str, Any]
"""What one model reads. ``input_ids``, ``attention_mask``, ``segments``: [batch, time]; ``spans``: [batch,
time, 2]. The student's has ``labels`` as well and, if examples have them, ``tasks``: the label of each one's
kind of task."""


@dataclass(frozen=True)
class EncodedExample:
    """One example in the tokens of every side."""

    example: Example
    student: Any
    """``EncodedText``, or what another trajectory makes of it; its length counts all tokens."""
    teachers: dict[str, EncodedText]
    """The example in the tokens of each teacher, by name."""


@dataclass(frozen=True)
class Reading:
    """The text that a teacher reads, if it is not the student's."""

    template: Template
    rationale: int = 0
    """Which of an example's rationales; 0 is the student's."""
    last_step: bool = True
    """Whether the last written step is in the text."""


class Collator:
    """Makes a batch of examples, or of examples encoded before. Every side tokenizes the same text by itself.

    Args:
        student_tokenizer: the student's.
        teacher_tokenizers: the teachers', by name.
        template: how an example becomes text.
        loss_on: which tokens of the student have labels.
        shuffle_teacher: a control. Row i of every teacher is then the text of example i + 1 of the batch (the
            last row's is the first): its own text, tokens and segments, but beside another student.
        max_length: most tokens of an example on any side.
        pad_to_multiple: ``time`` is padded to a multiple of this.
        readings: for teachers with a text of their own, of the same example: which text.
        separator: text between two written steps.
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
        """Encode examples for every side; None for one that is longer than ``max_length`` on any of them."""
        student = self.encode_student(examples)
        teachers = []
        for name, tokenizer in self.teacher_tokenizers.items():
            texts = self._texts_for_teacher(examples, name)
            teachers.append(self._encode_texts(texts, tokenizer))
        return self._combine_sides(examples, student, teachers)

    def encode_student(self, examples: Sequence[Example]) -> list[Any]:
        """Encode the student's side of examples; None for one that is too long."""
        texts = [render_example(example, self.template) for example in examples]
        return list(self._encode_texts(texts, self.student_tokenizer))

    def encode_written(
        self, examples: Sequence[Example], texts: Sequence[Text]
    ) -> list[EncodedExample | None]:
        """Encode texts that a model wrote for these examples, for every side; None for one that is too
        long."""
        student = self._encode_texts(texts, self.student_tokenizer)
        teachers = [self._encode_texts(texts, tokenizer) for tokenizer in self.teacher_tokenizers.values()]
        return self._combine_sides(examples, student, teachers)

    @staticmethod
    def unlabelled(item: EncodedExample) -> EncodedExample:
        """Return the example without labels, so that it has no cross-entropy."""
        no_labels = torch.full_like(item.student.labels, NO_LABEL)
        return replace(item, student=replace(item.student, labels=no_labels))

    def student_side(self, rows: Sequence[Any]) -> Side:
        """Return the student's tensors, with labels."""
        side = self._pad_side(rows, self.student_tokenizer)
        return side | {"labels": self._pad([row.labels for row in rows], NO_LABEL)}

    def teacher_side(self, rows: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> Side:
        """Return the tensors of a teacher."""
        return self._pad_side(rows, tokenizer)

    def __call__(self, batch: Sequence[Example | EncodedExample]) -> dict[str, Any]:
        """Return ``{"student": Side with labels and tasks, "teachers": {name: Side}, "labels": …}``, padded
        right.

        The labels are at the top as well because ``transformers.Trainer`` counts them there.

        Raises: SpecError: an example that is not yet encoded is too long; or one example with
            ``shuffle_teacher``.
        """
        items = self._encode_missing(batch)
        student = self.student_side([item.student for item in items])
        if any(item.example.task for item in items):
            student["tasks"] = tuple(item.example.task or "" for item in items)
        teacher_items = self._rotate(items) if self.shuffle_teacher else items
        teachers = {}
        for name, tokenizer in self.teacher_tokenizers.items():
            teachers[name] = self.teacher_side([item.teachers[name] for item in teacher_items], tokenizer)
        return {"student": student, "teachers": teachers, "labels": student["labels"]}

    def prompts(self, batch: Sequence[Example | EncodedExample]) -> tuple[Side, list[str]]:
        """Return ``input_ids`` and ``attention_mask`` of the prompts, padded left for generation, and the
        answers.

        The prompt is tokenized by itself: see ``kava_core.data.encoding.encode.count_prefix_mismatches``.

        Raises:
            SpecError: a prompt has no tokens.
        """
        texts, answers = [], []
        for entry in batch:
            example = entry.example if isinstance(entry, EncodedExample) else entry
            texts.append(render_example(example, self.template).prompt_part)
            answers.append(example.answer)
        rows = prompt_ids(texts, self.student_tokenizer)
        for text, row in zip(texts, rows, strict=True):
            if not len(row):
                raise SpecError(f"data: the student's tokenizer makes no tokens of the prompt {text.text!r}")
        padded, mask = pad_left(rows, pad_id(self.student_tokenizer))
        return {"input_ids": padded, "attention_mask": mask}, answers

    def _encode_texts(
        self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedText | None]:
        return encode_texts(texts, tokenizer, max_length=self.max_length, loss_on=self.loss_on)

    def _texts_for_teacher(self, examples: Sequence[Example], teacher: str) -> list[Text]:
        reading = self.readings.get(teacher, Reading(self.template))
        texts = []
        for example in examples:
            read_example = example.with_rationale(reading.rationale)
            if not reading.last_step:
                read_example = drop_last_step(read_example, self.separator)
            texts.append(render_example(read_example, reading.template))
        return texts

    def _combine_sides(
        self,
        examples: Sequence[Example],
        student: Sequence[Any],
        teachers: Sequence[Sequence[EncodedText | None]],
    ) -> list[EncodedExample | None]:
        """Put the sides of each example together; None for one that is too long on any side."""
        return [self._combine_row(*row) for row in zip(examples, student, *teachers, strict=True)]

    def _combine_row(
        self, example: Example, student: Any, *teachers: EncodedText | None
    ) -> EncodedExample | None:
        fitting = [side for side in teachers if side is not None]
        if student is None or len(fitting) < len(teachers):
            return None
        return EncodedExample(example, student, dict(zip(self.teacher_tokenizers, fitting, strict=True)))

    def _encode_missing(self, batch: Sequence[Example | EncodedExample]) -> list[EncodedExample]:
        """Encode the entries of a batch that are not yet encoded."""
        encoded = iter(self.encode([entry for entry in batch if isinstance(entry, Example)]))
        items: list[EncodedExample] = []
        for entry in batch:
            item = next(encoded) if isinstance(entry, Example) else entry
            if item is None:
                raise SpecError(f"data: an example is longer than max_length={self.max_length} tokens")
            items.append(item)
        return items

    @staticmethod
    def _rotate(items: list[EncodedExample]) -> list[EncodedExample]:
        """Move every example up by one row, the first to the end."""
        if len(items) < 2:
            raise SpecError("train.shuffle_teacher: needs batches of at least 2 examples, not 1")
        return items[1:] + items[:1]

    def _pad_side(self, rows: Sequence[EncodedText], tokenizer: PreTrainedTokenizerBase) -> Side:
        segments = self._pad([row.segments for row in rows], NOWHERE)
        return {
            "input_ids": self._pad([row.input_ids for row in rows], pad_id(tokenizer)),
            "attention_mask": (segments != NOWHERE).long(),
            "segments": segments,
            "spans": self._pad([row.spans for row in rows], 0),
        }

    def _pad(self, rows: list[Tensor], value: int) -> Int[Tensor, "batch time ..."]:
        """Pad rows right to one length, a multiple of ``pad_to_multiple``."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple
        return F.pad(padded, (0, 0) * (padded.dim() - 2) + (0, missing), value=value)


def pad_left(rows: Sequence[Int[Tensor, " _"]], value: int) -> tuple[Tensor, Tensor]:
    """Return tokens ``batch time`` that all end in the last column, to be continued from, and their mask."""
    real = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(real, batch_first=True, padding_side="left")
    tokens = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
    return tokens, mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with: the pad token, else EOS, else 0.

    It may be a token of the text as well: only masks show where padding is.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
