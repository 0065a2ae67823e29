"""Build what a run learns from: splits, tokenizers, encoded examples, collators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kava_core.data.collate import Collator, Reading
from kava_core.data.dataset import EncodedDataset
from kava_core.data.encoding.answer_judge import AnswerJudge
from kava_core.data.encoding.encode import count_prefix_mismatches
from kava_core.data.encoding.first_texts import alteration, notices_on_texts
from kava_core.data.examples import render_example
from kava_core.data.splits import Splits, load_splits, split_hash
from kava_core.data.store.reader import Store
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import SpecError
from kava_core.files import cache_folder
from kava_core.latent.collate import LatentCollator, with_thought_tokens
from kava_core.specfile.questions import used_teachers
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class Data:
    """Examples, tokenizers and encoded items of a run."""

    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase]
    collator: Collator
    """For training: rotates the teachers where the spec asks for that control."""
    plain_collator: Collator
    """For calibration and evaluation."""
    train_items: EncodedDataset
    validation_items: EncodedDataset
    judge: AnswerJudge
    """Judges what the student writes."""
    notices: tuple[str, ...] = ()
    """What a user should know of data and tokenizers, a line each."""
    store: Store | None = None
    """Where the collators read the teachers' targets; None runs the teachers."""

    def longest(self) -> dict[str | None, int]:
        """Count the most tokens of an example on each side.

        Returns:
            By the teacher's name; under None the student's.
        """
        items = [*self.train_items.items, *self.validation_items.items]
        most: dict[str | None, int] = {None: max(len(item.student) for item in items)}
        for name in self.teacher_tokenizers:
            most[name] = max(len(item.teachers[name].input_ids) for item in items)
        return most

    def longest_prompt(self) -> int:
        """Count the most tokens of a validation example's prompt, for the student."""
        return max(item.student.prompt_length for item in self.validation_items.items)

    def report(self) -> dict[str, Any]:
        """Return what run.json records of the data: sizes, hashes, duplicates, examples left out."""
        dropped = {"train": self.train_items.dropped, "validation": self.validation_items.dropped}
        mismatches = count_prefix_mismatches(
            self.validation_items.examples, self.tokenizer, self.plain_collator.template
        )
        sides = {"train": self.train_items, "validation": self.validation_items}
        kept = {name: split_hash(items.examples) for name, items in sides.items()}
        more = {"too_long": dropped, "kept": kept, "prompt_prefix_mismatches": mismatches}
        return self.splits.report() | more


def load_or_train_tokenizer(
    model: ModelSpec, splits: Splits, template: Any, *, where: str
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, or train it on the training texts; a trained one is cached.

    Args:
        model: the model's section of the spec.
        splits: has the training examples.
        template: renders them to texts.
        where: how errors name the section.

    Raises:
        SpecError: the tokenizer cannot be loaded or trained.
    """
    texts = (render_example(example, template).text for example in splits.train)
    try:
        return load_tokenizer(model, texts=texts, cache=cache_folder() / "tokenizers")
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def teacher_reading(spec: PipelineSpec, teacher: TeacherSpec) -> Reading:
    """Return what a teacher reads of an example: its template and which written steps."""
    return Reading(teacher.template or spec.data.template, teacher.rationale, teacher.last_step)


def make_data(spec: PipelineSpec, idle: Sequence[TeacherSpec] = ()) -> Data:
    """Load, split and tokenize a run's examples.

    Args:
        spec: the run's.
        idle: teachers that may not run, but whose ``max_length`` counts too: variants with and without them
            then learn from the same examples.

    Raises:
        SpecError: the data or a tokenizer cannot be loaded.
    """
    splits = load_splits(spec.data, root=Path.cwd())
    template = spec.data.template
    tokenizer = load_or_train_tokenizer(spec.student, splits, template, where="student")
    used = {teacher.name: teacher for teacher in used_teachers(spec)}
    declared = {teacher.name: teacher for teacher in idle} | used
    readings = {name: teacher_reading(spec, teacher) for name, teacher in declared.items()}
    tokenizers = {}
    for name, teacher in declared.items():
        if teacher.itself is not None:
            tokenizers[name] = tokenizer
        else:
            tokenizers[name] = load_or_train_tokenizer(
                teacher, splits, readings[name].template, where=f"teacher {name!r}"
            )
    teachers = {name: tokenizers[name] for name in used}
    kind: Any = Collator
    if spec.trajectory == "latent":
        tokenizer = with_thought_tokens(tokenizer)
        kind = partial(LatentCollator, latent=spec.latent)
    make = partial(
        kind,
        tokenizer,
        template=template,
        loss_on=spec.train.loss_on,
        max_length=spec.train.max_length,
        readings=readings,
        separator=spec.data.separator,
    )
    plain, every = make(teacher_tokenizers=teachers), make(teacher_tokenizers=tokenizers)
    encoded = partial(EncodedDataset, collator=every, teachers=teachers)
    judge = AnswerJudge.of_examples(tokenizer, template, splits.validation)
    _refuse_altered_texts(spec, judge)
    return Data(
        splits,
        tokenizer,
        teachers,
        collator=make(teacher_tokenizers=teachers, shuffle_teacher=spec.train.shuffle_teacher),
        plain_collator=plain,
        train_items=encoded(splits.train),
        validation_items=encoded(splits.validation[: spec.evaluate.examples]),
        judge=judge,
        notices=tuple(_notices(spec, splits, judge, teachers, readings)),
    )


def _refuse_altered_texts(spec: PipelineSpec, judge: AnswerJudge) -> None:
    """Raise SpecError if teachers are to read what the student wrote, and its tokenizer alters texts."""
    if spec.online is not None and judge.altered is not None:
        raise SpecError(f"online: teachers read the student's texts, but {alteration(judge.altered)}")


def _notices(
    spec: PipelineSpec,
    splits: Splits,
    judge: AnswerJudge,
    teachers: Mapping[str, PreTrainedTokenizerBase],
    readings: Mapping[str, Reading],
) -> Iterator[str]:
    """Yield what a user should know of the data as the models read it."""
    examples = [*splits.train, *splits.validation]
    yield from notices_on_texts(judge.tokenizer, examples, spec.data.template, who="student")
    if judge.altered is not None and spec.evaluate.generate:
        yield f"student: {alteration(judge.altered)}; answers are compared token by token"
    for name, tokenizer in teachers.items():
        template = readings[name].template
        yield from notices_on_texts(tokenizer, examples, template, who=f"teacher {name!r}")
