"""Build what is trained: student, pipeline and teachers in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kava_core.build.aligned_states import make_aligned_states
from kava_core.build.data import Data
from kava_core.build.pipeline import assert_learns, config_geometries, load_projectors, make_pipeline
from kava_core.build.teachers import check_teachers_run, load_checked_teachers, make_teachers
from kava_core.data.store.index import PROJECTORS_FILE
from kava_core.data.store.reader import Store
from kava_core.distill.aligned_states import AlignedStates
from kava_core.distill.cross_tokenizer.cross_logits import CrossLogits
from kava_core.distill.cross_tokenizer.shared_tokens import SharedTokens
from kava_core.distill.distiller import Distiller
from kava_core.distill.student_pass import LatentSetup
from kava_core.errors import SpecError
from kava_core.kv.capture.geometry import model_geometry
from kava_core.kv.compare.no_distillation import NoDistillation
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.latent.tokens import LatentTokens
from kava_core.models.config import check_answer_fits, check_fits_positions
from kava_core.models.stand_ins.load_teacher import teacher_geometry
from kava_core.models.student import load_student
from kava_core.protocols.fuser import Rewarded
from kava_core.specfile.questions import (
    active_losses,
    compared_parts,
    cross_logit_teachers,
    hidden_state_teacher,
    logit_teachers,
    used_teachers,
)
from kava_core.specfile.sections.pipeline import PipelineSpec


def make_distiller(spec: PipelineSpec, data: Data, *, seed: int) -> Distiller:
    """Build a run's distiller; the student's weights depend on the seed alone.

    Args:
        spec: with every model ready to load.
        data: the run's.
        seed: the run's.

    Raises:
        SpecError: a model cannot read the data, or be what the spec asks of it.
    """
    is_latent = spec.trajectory == "latent"
    student = load_student(spec.student, data.tokenizer, seed=seed, grow=is_latent)
    latent = make_latent(spec, student, seed=seed) if is_latent else None
    _check_student_fits(spec, data, student)
    if not used_teachers(spec):
        assert_learns(spec, NoDistillation())
        return Distiller(student, latent=latent)
    if data.store is not None:
        return _make_stored_distiller(spec, data, data.store, student, seed)
    models = load_checked_teachers(spec, data, student)
    hidden = make_aligned_states(spec, models, student, seed=seed)
    pipeline = _make_run_pipeline(spec, models, student, seed, hidden)
    check_teachers_run(spec, pipeline)
    if spec.online is not None and spec.online.share == 1 and isinstance(pipeline.fuser, Rewarded):
        raise SpecError("online.share: 1 leaves no labels, and the fuser learns from their cross-entropy")
    return Distiller(
        student,
        pipeline,
        make_teachers(spec, models, pipeline),
        parts=compared_parts(spec),
        rotary=spec.rotary,
        stream=spec.train.stream,
        logits=spec.logits if logit_teachers(spec) else None,
        cross_logits=make_cross_logits(spec, data),
        hidden=hidden,
        latent=latent,
    )


def make_cross_logits(spec: PipelineSpec, data: Data) -> CrossLogits | None:
    """Build the term of logits across tokenizers; None if there is none."""
    names = cross_logit_teachers(spec)
    if not names or spec.cross_logits is None:
        return None
    vocabularies = {name: SharedTokens(data.tokenizer, data.teacher_tokenizers[name]) for name in names}
    return CrossLogits(spec.cross_logits, vocabularies)


def _check_student_fits(spec: PipelineSpec, data: Data, student: Any) -> None:
    check_fits_positions(student.config, data.longest()[None], who="student")
    if spec.evaluate.generate:
        check_answer_fits(student.config, data.longest_prompt(), spec.evaluate.max_new_tokens)
    if spec.online is not None:
        longest_prompt = max(item.student.prompt_length for item in data.train_items.items)
        check_answer_fits(
            student.config, longest_prompt, spec.online.max_new_tokens, field="online.max_new_tokens"
        )


def _make_run_pipeline(
    spec: PipelineSpec, models: Mapping[str, Any], student: nn.Module, seed: int, hidden: AlignedStates | None
) -> KVPipeline:
    if not active_losses(spec) or not models:
        assert_learns(spec, NoDistillation() if hidden is None else hidden)
        return NoDistillation()
    geometries = {name: teacher_geometry(model) for name, model in models.items()}
    return make_pipeline(spec, geometries, model_geometry(student), seed=seed)


def make_latent(spec: PipelineSpec, student: Any, *, seed: int) -> LatentSetup:
    """Build the latent tokens and the settings of their losses; own weights depend on the seed alone."""
    latent = spec.latent
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = student.get_input_embeddings().weight.shape[1]
        tokens = LatentTokens(latent.count, latent.passes, width, latent.projection, begin=latent.begin)
    reading_weight = sum(t.itself.cross_entropy for t in spec.teachers if t.itself is not None)
    return LatentSetup(
        tokens, latent, spec.codi if hidden_state_teacher(spec) else None, float(reading_weight)
    )


def _make_stored_distiller(
    spec: PipelineSpec, data: Data, store: Store, student: nn.Module, seed: int
) -> Distiller:
    """Build without teachers: their geometry is known from their configs, their targets are in the store."""
    pipeline = make_pipeline(spec, config_geometries(spec, data), model_geometry(student), seed=seed)
    load_projectors(pipeline, store.folder / PROJECTORS_FILE)
    return Distiller(student, pipeline, parts=compared_parts(spec), rotary=spec.rotary)
