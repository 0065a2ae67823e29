"""Build the trainable and calibrated parts beside the student, from geometries alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kava_core.build.aligner import build_aligner
from kava_core.build.data import Data
from kava_core.config import KVLossConfig
from kava_core.errors import CheckpointError, SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.boundaries import attribute_errors_to, build_component
from kava_core.kv.compare.checks import (
    check_calibration,
    check_observing,
    check_rotation,
    check_views,
    check_widths,
)
from kava_core.kv.compare.freeze_unused import freeze_unused
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import ComparedLoss
from kava_core.kv.compare.weights import unique_names
from kava_core.models.config import config_geometry, model_config
from kava_core.protocols.axes import Geometry
from kava_core.specfile.questions import active_losses, compared_layers, compared_parts, layers_of_loss
from kava_core.specfile.sections.pipeline import PipelineSpec


def make_pipeline(
    spec: PipelineSpec, teachers: Mapping[str, Geometry], student: Geometry, *, seed: int
) -> KVPipeline:
    """Build a run's pipeline with weights drawn from the seed; the global generator is left as it was.

    Args:
        spec: the run's.
        teachers: geometry of every teacher, in the spec's order.
        student: the student's geometry.
        seed: the run's.

    Raises:
        SpecError: the components do not fit together, or nothing would be trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = build_pipeline(spec, teachers=teachers, student=student)
    freeze_unused(pipeline, parts=compared_parts(spec), student=student)
    assert_learns(spec, pipeline)
    return pipeline


def build_pipeline(spec: PipelineSpec, *, teachers: Mapping[str, Geometry], student: Geometry) -> KVPipeline:
    """Build aligners, fuser and losses in the spec's order, and check that they fit together.

    Args:
        spec: names the components, and how caches are compared.
        teachers: geometry of every teacher, in the spec's order.
        student: the student's geometry.

    Raises:
        SpecError: the components do not fit together (say, a fused target from different views).
        PluginError: a component returns what its contract forbids.
    """
    layers, parts = compared_layers(spec, student.layer), compared_parts(spec)
    configs = active_losses(spec)
    separate, rotates_targets = spec.target == "separate", spec.rotary == "match"
    aligners = []
    for teacher, (name, geometry) in zip(spec.teachers, teachers.items(), strict=True):
        aligners.append(
            build_aligner(
                teacher.align, name=name, teacher=geometry, student=student, layers=layers, parts=parts
            )
        )
    check_calibration(aligners, parts)
    check_views(aligners, separate=separate)
    check_widths(aligners, configs)
    if rotates_targets:
        check_rotation(aligners, student.with_(layer=len(layers)))
    view = aligners[0].view
    with attribute_errors_to(f"fuser {spec.fuser.name!r}", spec.fuser):
        fuser = build_component(
            spec.fuser, teachers=tuple(teachers), student=view.with_(hidden=student.hidden)
        )
    compared = compared_losses(configs, layers, merged_layers=view.layer, student_layers=student.layer)
    losses = [build_losses(compared, aligner) for aligner in (aligners if separate else aligners[:1])]
    if rotates_targets:
        for of_aligner in losses:
            check_observing(of_aligner, configs)
    return KVPipeline(
        aligners,
        fuser,
        losses,
        compared=compared,
        fuser_config=spec.fuser,
        layers=layers,
        parts=parts,
        separate=separate,
        rotates_targets=rotates_targets,
        hidden=student.hidden,
        student_is_latent=spec.trajectory == "latent",
    )


def compared_losses(
    configs: Sequence[KVLossConfig], layers: tuple[int, ...], *, merged_layers: int, student_layers: int
) -> list[ComparedLoss]:
    """Return which of the compared layers each loss looks at.

    Args:
        configs: the losses.
        layers: the compared layers of the student, ascending.
        merged_layers: how many layers the head adapters leave: fewer if they merge them.
        student_layers: layers of the student.

    Raises:
        SpecError: layers are merged, and a loss looks at only some of them.
    """
    compared = []
    terms = unique_names([config.name for config in configs])
    for term, config in zip(terms, configs, strict=True):
        wanted = layers_of_loss(config, student_layers)
        if merged_layers == len(layers):
            rows = tuple(layers.index(layer) for layer in wanted)
        elif len(wanted) < len(layers):
            raise SpecError(
                f"loss {config.name!r} looks at layers {wanted}, but the head adapter merges layers "
                f"{list(layers)} into one: all losses must look at the same layers"
            )
        else:
            rows = tuple(range(merged_layers))
        compared.append(ComparedLoss(term, config, rows))
    return compared


def build_losses(compared: Sequence[ComparedLoss], aligner: TeacherAligner) -> list[nn.Module]:
    """Build every loss for the extents at which one teacher is compared."""
    losses = []
    for loss in compared:
        layer = len(loss.rows)
        with attribute_errors_to(f"kv_loss {loss.config.name!r}", loss.config):
            losses.append(
                build_component(
                    loss.config,
                    teacher=aligner.target.with_(layer=layer),
                    student=aligner.view.with_(layer=layer),
                )
            )
    return losses


def assert_learns(spec: PipelineSpec, beside_student: nn.Module) -> None:
    """Check that something is trained: the student, an aligner, a loss or the fuser.

    Args:
        spec: the run's.
        beside_student: what may be trained beside it.

    Raises:
        SpecError: nothing is.
    """
    trains_beside_student = any(parameter.requires_grad for parameter in beside_student.parameters())
    if spec.student.frozen and not trains_beside_student:
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
    """Return the state of calibrated projectors, which is computed before the first step.

    Returns:
        Tensors on the CPU by ``teacher/name``.
    """
    state = {}
    for aligner in pipeline.teachers:
        if aligner.wants_calibration:
            for name, tensor in aligner.dim_projector.state_dict().items():
                state[f"{aligner.name}/{name}"] = tensor.detach().cpu().contiguous()
    return state


def load_projectors(pipeline: KVPipeline, file: Path) -> None:
    """Load the state of calibrated projectors that ``projector_state`` returned, from a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the projectors.
    """
    try:
        saved = load_file(file)
        for aligner in pipeline.teachers:
            if aligner.wants_calibration:
                prefix = f"{aligner.name}/"
                state = {}
                for name, tensor in saved.items():
                    if name.startswith(prefix):
                        state[name.removeprefix(prefix)] = tensor
                aligner.dim_projector.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error
