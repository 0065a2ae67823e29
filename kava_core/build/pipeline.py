"""Build the trainable and calibrated parts beside the student, from geometries alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.build.data import Data
from kava_core.errors import CheckpointError, SpecError
from kava_core.kv.capture.geometry import probe_geometry
from kava_core.kv.compare.freeze_unused import freeze_unused
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.models.load import model_config
from kava_core.protocols.axes import Geometry
from kava_core.specfile.questions import compared_parts
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


def assert_learns(spec: PipelineSpec, pipeline: KVPipeline | None) -> None:
    """SpecError where nothing would be trained."""
    learns = pipeline is not None and any(p.requires_grad for p in pipeline.parameters())
    if spec.student.frozen and not learns:
        raise SpecError("student.frozen: no aligner or router is trained either, so nothing would learn")


def config_geometries(spec: PipelineSpec, data: Data) -> dict[str, Geometry]:
    """Every teacher's geometry, by name; no model is loaded."""
    tokenizers = data.teacher_tokenizers
    return {
        t.name: config_geometry(t, tokenizers[t.name], where=f"teacher {t.name!r}") for t in spec.teachers
    }


def config_geometry(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, *, where: str) -> Geometry:
    """A model's geometry, from its config."""
    return probe_geometry(model_config(model, tokenizer, where=where))


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
    freeze_unused(pipeline, parts=compared_parts(spec), student=student)
    assert_learns(spec, pipeline)
    return pipeline
