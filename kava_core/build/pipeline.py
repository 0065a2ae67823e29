"""Build the trainable and calibrated parts beside the student, from geometries alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kava_core.build.data import Data
from kava_core.errors import CheckpointError, SpecError
from kava_core.kv.compare.freeze_unused import freeze_unused
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.models.config import config_geometry, model_config
from kava_core.protocols.axes import Geometry
from kava_core.specfile.questions import parts_of
from kava_core.specfile.sections.pipeline import PipelineSpec


def assert_learns(spec: PipelineSpec, pipeline: KVPipeline | None) -> None:
    """SpecError where nothing would be trained."""
    learns = pipeline is not None and any(p.requires_grad for p in pipeline.parameters())
    if spec.student.frozen and not learns:
        raise SpecError("student.frozen: no aligner or router is trained either, so nothing would learn")


def config_geometries(spec: PipelineSpec, data: Data) -> dict[str, Geometry]:
    """Return every teacher's geometry, by name; no model is loaded."""
    geometries = {}
    for teacher in spec.teachers:
        where = f"teacher {teacher.name!r}"
        config = model_config(teacher, data.teacher_tokenizers[teacher.name], where=where)
        geometries[teacher.name] = config_geometry(config, where=where)
    return geometries


def student_config_geometry(spec: PipelineSpec, data: Data) -> Geometry:
    """Return the student's geometry; no model is loaded."""
    config = model_config(spec.student, data.tokenizer, where="student")
    return config_geometry(config, where="student")


def projector_state(pipeline: KVPipeline) -> dict[str, Tensor]:
    """The state of calibrated projectors, which is computed before the first step."""
    return {
        f"{aligner.name}/{name}": tensor.detach().cpu().contiguous()
        for aligner in pipeline.teachers
        if aligner.wants_calibration
        for name, tensor in aligner.dim_projector.state_dict().items()
    }


def load_projectors(pipeline: KVPipeline, file: Path) -> None:
    """Load what ``projector_state`` gave; CheckpointError where it does not fit."""
    try:
        saved = load_file(file)
        for aligner in pipeline.teachers:
            if aligner.wants_calibration:
                mine = f"{aligner.name}/"
                state = {name.removeprefix(mine): x for name, x in saved.items() if name.startswith(mine)}
                aligner.dim_projector.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error


def make_pipeline(
    spec: PipelineSpec, teachers: Mapping[str, Geometry], student: Geometry, *, seed: int
) -> KVPipeline:
    """The pipeline with its weights drawn from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = KVPipeline(spec, teachers=teachers, student=student)
    freeze_unused(pipeline, parts=parts_of(spec), student=student)
    assert_learns(spec, pipeline)
    return pipeline
