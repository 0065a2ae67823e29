"""Everything one run needs, made from its spec: tokenizers, data, models, the distiller."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kava_core.build.data import Data
from kava_core.build.pipeline import assert_learns, config_geometries, load_projectors, make_pipeline
from kava_core.build.teachers import check_teachers_run, load_checked_teachers, make_teachers
from kava_core.data.store.index import PROJECTORS_FILE
from kava_core.data.store.reader import Store
from kava_core.distill.distiller import Distiller
from kava_core.distill.student_pass import LatentSetup
from kava_core.errors import SpecError
from kava_core.kv.capture.geometry import model_geometry
from kava_core.latent.tokens import LatentTokens
from kava_core.models.config import check_answer_fits, check_fits_positions
from kava_core.models.student import load_student
from kava_core.protocols.fuser import Rewarded
from kava_core.specfile.questions import (
    active_losses,
    compared_parts,
    hidden_state_teacher,
    logit_teachers,
    used_teachers,
)
from kava_core.specfile.sections.pipeline import PipelineSpec


def make_distiller(spec: PipelineSpec, data: Data, *, seed: int) -> Distiller:
    """Student, pipeline and teachers; the student's weights depend on the seed alone."""
    latent = spec.trajectory == "latent"
    student: Any = load_student(spec.student, data.tokenizer, seed=seed, grow=latent)
    how: dict[str, Any] = {"latent": make_latent(spec, student, seed=seed) if latent else None}
    check_fits_positions(student.config, data.longest()[None], who="student")
    if spec.evaluate.generate:
        check_answer_fits(student.config, data.longest_prompt(), spec.evaluate.max_new_tokens)
    if spec.online is not None:
        most = max(item.student.prompt_length for item in data.train_items.items)
        field = "online.max_new_tokens"
        check_answer_fits(student.config, most, spec.online.max_new_tokens, field=field)
    if not used_teachers(spec):
        assert_learns(spec, None)
        return Distiller(student, **how)
    if data.store is not None:
        return _make_stored_distiller(spec, data, data.store, student, seed)
    models = load_checked_teachers(spec, data, student)
    geometries = (
        {name: model_geometry(model) for name, model in models.items()} if active_losses(spec) else {}
    )
    pipeline = make_pipeline(spec, geometries, model_geometry(student), seed=seed) if geometries else None
    check_teachers_run(spec, pipeline)
    if (
        spec.online is not None
        and spec.online.share == 1
        and isinstance(pipeline and pipeline.fuser, Rewarded)
    ):
        raise SpecError("online.share: 1 leaves no labels, and the fuser learns from their cross-entropy")
    return Distiller(
        student,
        pipeline,
        make_teachers(spec, models, pipeline),
        **how,
        parts=compared_parts(spec),
        rotary=spec.rotary,
        stream=spec.train.stream,
        logits=spec.logits if logit_teachers(spec) else None,
    )


def make_latent(spec: PipelineSpec, student: Any, *, seed: int) -> LatentSetup:
    """The latent tokens, whose own weights depend on the seed alone."""
    how = spec.latent
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = student.get_input_embeddings().weight.shape[1]
        tokens = LatentTokens(how.count, how.passes, width, how.projection, begin=how.begin)
    reading = sum(t.itself.cross_entropy for t in spec.teachers if t.itself is not None)
    return LatentSetup(tokens, how, spec.codi if hidden_state_teacher(spec) else None, float(reading))


def _make_stored_distiller(
    spec: PipelineSpec, data: Data, store: Store, student: nn.Module, seed: int
) -> Distiller:
    """Without teachers: their geometry is known from their configs, their targets lie in the store."""
    pipeline = make_pipeline(spec, config_geometries(spec, data), model_geometry(student), seed=seed)
    load_projectors(pipeline, store.folder / PROJECTORS_FILE)
    return Distiller(student, pipeline, parts=compared_parts(spec), rotary=spec.rotary)
