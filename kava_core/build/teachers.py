"""Build the teachers that run, and check that each can be what the spec asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kava_core.build.data import Data
from kava_core.distill.logits import assert_same_vocabulary
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.eviction import Eviction
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.models.config import check_fits_positions
from kava_core.models.load import load_model
from kava_core.models.own_teacher import OwnTeacher
from kava_core.models.teacher import Teacher
from kava_core.specfile.questions import (
    compared_parts,
    hidden_state_teacher,
    logit_teachers,
    shared_weights_key,
    used_teachers,
)
from kava_core.specfile.sections.pipeline import PipelineSpec


def load_checked_teachers(spec: PipelineSpec, data: Data, student: Any) -> dict[str, Any]:
    """The teachers' models, by name; SpecError where one cannot read, or be, what it is to."""
    for name in logit_teachers(spec):
        assert_same_vocabulary(data.tokenizer, data.teacher_tokenizers[name], who=f"teacher {name!r}")
    _check_rationales(spec, data)
    models, longest = load_teachers(spec, data, student), data.longest()
    if (whose := hidden_state_teacher(spec)) is not None:
        _assert_same_hidden_states(models[whose].config, student.config, whose)
    for name, model in models.items():
        check_fits_positions(model.config, longest[name], who=f"teacher {name!r}")
    return models


def make_teachers(
    spec: PipelineSpec, models: Mapping[str, Any], pipeline: KVPipeline | None
) -> list[Teacher]:
    """Models that are run for their caches, their logits or both."""
    layers = {aligner.name: aligner.sources for aligner in pipeline.teachers} if pipeline is not None else {}
    evictions = {a.name: make_eviction(spec, a) for a in pipeline.teachers} if pipeline is not None else {}
    how: dict[str, Any] = {"parts": compared_parts(spec), "rotary": spec.rotary}
    own = {t.name: t.itself.cross_entropy for t in spec.teachers if t.itself is not None}

    def teacher(name: str, model: Any) -> Teacher:
        found = {"layers": layers.get(name, ()), "eviction": evictions.get(name)} | how
        if name in own:
            return OwnTeacher(
                name, model, logits=own[name] > 0, hidden=name == hidden_state_teacher(spec), **found
            )
        return Teacher(
            name,
            model,
            logits=name in logit_teachers(spec),
            hidden=name == hidden_state_teacher(spec),
            **found,
        )

    return [teacher(name, model) for name, model in models.items()]


def _assert_same_hidden_states(teacher: Any, student: Any, name: str) -> None:
    """SpecError where hidden states cannot be compared one by one."""
    sides = [config.get_text_config() for config in (teacher, student)]
    (depth, width), own = ((side.num_hidden_layers, side.hidden_size) for side in sides)
    if (depth, width) != own:
        raise SpecError(
            f"codi: teacher {name!r} has {depth} layers of width {width}, the student {own[0]} of {own[1]}; "
            "CODI's term compares them one by one: use losses, which align"
        )


def make_eviction(spec: PipelineSpec, aligner: TeacherAligner) -> Eviction | None:
    """How a teacher's reasoning is cut down to the latent tokens; None where no time warper does."""
    if aligner.evictor is None:
        return None
    how: dict[str, Any] = {"parts": compared_parts(spec), "rotary": spec.rotary}
    who = f"the time warper of teacher {aligner.name!r}"
    return Eviction(aligner.evictor, spec.latent.count, **how, who=who)


def _check_rationales(spec: PipelineSpec, data: Data) -> None:
    """SpecError for a teacher that asks for another rationale where no example has one."""
    for teacher in used_teachers(spec):
        if teacher.rationale and not any(example.rationales for example in data.train_items.examples):
            raise SpecError(
                f"teacher {teacher.name!r}: rationale: {teacher.rationale}, but no training example has "
                "'rationales'; `kava sample` writes them"
            )


def check_teachers_run(spec: PipelineSpec, pipeline: KVPipeline | None) -> None:
    """SpecError for a teacher that something beside the KV losses needs but that does not run."""
    if pipeline is None:
        return
    hidden = hidden_state_teacher(spec)
    needed = {} if hidden is None else {hidden: "codi"}
    needed |= {t.name: "itself" for t in spec.teachers if t.itself is not None and t.itself.cross_entropy}
    if pipeline.draws and (found := [name for name in pipeline.names if name in needed]):
        raise SpecError(
            f"{needed[found[0]]}: the fuser draws teachers, so {found[0]!r} would not run in every step; "
            "use fixed weights without 'sample'"
        )
    if pipeline.draws:
        return
    needed = {name: "logits" for name in logit_teachers(spec)} | needed
    for name, runs in zip(pipeline.names, pipeline.choose(), strict=True):
        if name in needed and not runs:
            raise SpecError(
                f"{needed[name]}: teacher {name!r} has weight 0 in the fuser, so it does not run; name "
                "another teacher, or give it a weight"
            )


def load_teachers(spec: PipelineSpec, data: Data, student: Any = None) -> dict[str, Any]:
    """Every teacher's model, by name; teachers that differ only in what they read share one.

    ``student`` is the model of a teacher that is the student itself.
    """
    models: dict[str, Any] = {}
    loaded: dict[Any, Any] = {}
    for teacher in used_teachers(spec):
        if teacher.itself is not None:
            models[teacher.name] = student
            continue
        tokenizer = data.teacher_tokenizers[teacher.name]
        key = shared_weights_key(teacher), tuple(sorted(tokenizer.get_vocab().items()))
        if key not in loaded:
            loaded[key] = load_model(teacher, tokenizer, seed=0, where=f"teacher {teacher.name!r}")
        models[teacher.name] = loaded[key]
    return models
