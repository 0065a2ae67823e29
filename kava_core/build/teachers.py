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
from kava_core.models.own_teacher import OwnTeacher
from kava_core.models.stand_ins.load_teacher import load_teacher
from kava_core.models.stand_ins.token_identity import TokenTeacher, TokenVectors
from kava_core.models.teacher import Teacher
from kava_core.specfile.questions import (
    compared_parts,
    cross_logit_teachers,
    hidden_state_teacher,
    hidden_teachers,
    logit_teachers,
    shared_weights_key,
    teachers_to_logits,
    used_teachers,
)
from kava_core.specfile.sections.pipeline import PipelineSpec


def load_checked_teachers(spec: PipelineSpec, data: Data, student: Any) -> dict[str, Any]:
    """Load the teachers' models and check them.

    Returns:
        Models by the teacher's name.

    Raises:
        SpecError: a model cannot read the data, or be what the spec asks of it.
    """
    for name in logit_teachers(spec):
        assert_same_vocabulary(data.tokenizer, data.teacher_tokenizers[name], who=f"teacher {name!r}")
    _check_rationales(spec, data)
    models, longest = load_teachers(spec, data, student), data.longest()
    hidden_teacher = hidden_state_teacher(spec)
    if hidden_teacher is not None:
        _assert_same_hidden_states(models[hidden_teacher].config, student.config, hidden_teacher)
    for name, model in models.items():
        check_fits_positions(model.config, longest[name], who=f"teacher {name!r}")
    return models


def load_teachers(spec: PipelineSpec, data: Data, student: Any = None) -> dict[str, Any]:
    """Load every teacher's model; teachers that differ only in what they read share one.

    Args:
        spec: with every model ready to load.
        data: the run's; it has the tokenizers.
        student: the model of a teacher that is the student itself.

    Returns:
        Models by the teacher's name.
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
            loaded[key] = load_teacher(teacher, tokenizer)
        models[teacher.name] = loaded[key]
    return models


def make_teachers(spec: PipelineSpec, models: Mapping[str, Any], pipeline: KVPipeline) -> list[Teacher]:
    """Make of models what is run for their caches, their logits and their hidden states.

    Args:
        spec: the run's.
        models: every teacher's, by name.
        pipeline: has an aligner for every teacher, which decides the layers that are read.
    """
    aligners = {aligner.name: aligner for aligner in pipeline.teachers}
    own_cross_entropy = {t.name: t.itself.cross_entropy for t in spec.teachers if t.itself is not None}
    their_logits = teachers_to_logits(spec)
    their_states = {*hidden_teachers(spec), hidden_state_teacher(spec)}
    teachers: list[Teacher] = []
    for name, model in models.items():
        aligner, is_own = aligners.get(name), name in own_cross_entropy
        if isinstance(model, TokenVectors):
            assert aligner is not None
            teachers.append(_token_teacher(spec, model, aligner))
            continue
        kind = OwnTeacher if is_own else Teacher
        teachers.append(
            kind(
                name,
                model,
                layers=() if aligner is None else aligner.sources,
                parts=compared_parts(spec),
                rotary=spec.rotary,
                logits=own_cross_entropy[name] > 0 if is_own else name in their_logits,
                hidden=name in their_states,
                eviction=None if aligner is None else make_eviction(spec, aligner),
            )
        )
    return teachers


def _token_teacher(spec: PipelineSpec, vectors: TokenVectors, aligner: TeacherAligner) -> TokenTeacher:
    return TokenTeacher(
        aligner.name,
        vectors,
        layers=aligner.sources,
        parts=compared_parts(spec),
        eviction=make_eviction(spec, aligner),
    )


def make_eviction(spec: PipelineSpec, aligner: TeacherAligner) -> Eviction | None:
    """Build what cuts a teacher's reasoning tokens down to the number of latent tokens.

    None if the teacher's time warper does not evict.
    """
    if aligner.evictor is None:
        return None
    who = f"the time warper of teacher {aligner.name!r}"
    parts = compared_parts(spec)
    (config,) = (teacher.align.time_warper for teacher in spec.teachers if teacher.name == aligner.name)
    return Eviction(
        aligner.evictor, spec.latent.count, parts=parts, rotary=spec.rotary, who=who, config=config
    )


def check_teachers_run(spec: PipelineSpec, pipeline: KVPipeline) -> None:
    """Check that every teacher runs that something beside the KV losses needs.

    Raises:
        SpecError: the fuser may leave such a teacher out.
    """
    if not pipeline.compared:
        return
    needed_always: dict[str, str] = {}
    hidden_teacher = hidden_state_teacher(spec)
    if hidden_teacher is not None:
        needed_always[hidden_teacher] = "codi"
    for teacher in spec.teachers:
        if teacher.itself is not None and teacher.itself.cross_entropy:
            needed_always[teacher.name] = "itself"
    if pipeline.draws_teachers:
        for name in pipeline.names:
            if name in needed_always:
                raise SpecError(
                    f"{needed_always[name]}: the fuser draws teachers, so {name!r} would not run in every "
                    "step; use fixed weights without 'sample'"
                )
        return
    needed = dict.fromkeys(hidden_teachers(spec), "hidden")
    needed |= dict.fromkeys(cross_logit_teachers(spec), "cross_logits")
    needed |= dict.fromkeys(logit_teachers(spec), "logits") | needed_always
    for name, runs in zip(pipeline.names, pipeline.choose_teachers(), strict=True):
        if name in needed and not runs:
            raise SpecError(
                f"{needed[name]}: teacher {name!r} has weight 0 in the fuser, so it does not run; name "
                "another teacher, or give it a weight"
            )


def _assert_same_hidden_states(teacher: Any, student: Any, name: str) -> None:
    """Raise SpecError if hidden states of two configs cannot be compared one by one."""
    theirs, own = teacher.get_text_config(), student.get_text_config()
    if (theirs.num_hidden_layers, theirs.hidden_size) != (own.num_hidden_layers, own.hidden_size):
        raise SpecError(
            f"codi: teacher {name!r} has {theirs.num_hidden_layers} layers of width {theirs.hidden_size}, "
            f"the student {own.num_hidden_layers} of {own.hidden_size}; CODI's term compares them one by "
            "one: use losses, which align"
        )


def _check_rationales(spec: PipelineSpec, data: Data) -> None:
    """Raise SpecError for a teacher that asks for another rationale if no example has one."""
    for teacher in used_teachers(spec):
        if teacher.rationale and not any(example.rationales for example in data.train_items.examples):
            raise SpecError(
                f"teacher {teacher.name!r}: rationale: {teacher.rationale}, but no training example has "
                "'rationales'; `kava sample` writes them"
            )
