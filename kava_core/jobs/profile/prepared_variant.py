"""Make one variant ready to be profiled: real models, calibrated aligners, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from jaxtyping import Bool
from torch import Tensor

from kava_core.build.aligner import build_aligner
from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.layer_maps import with_measured_maps
from kava_core.config import Part
from kava_core.data.dataset import split_nearly_equal
from kava_core.distill.distiller import Distiller
from kava_core.distill.teachers import token_mask
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.capture.capture import Capture
from kava_core.kv.capture.geometry import model_geometry
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.maths.masks import without_autocast
from kava_core.models.teacher import Teacher
from kava_core.protocols.axes import PARTS, Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.questions import active_losses
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.before_training import calibrate_components
from kava_core.train.run import with_pretrained_models

KEYS_AND_VALUES: tuple[Part, ...] = ("keys", "values")
"""What attention needs of a teacher, whatever the losses compare."""

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Side = Mapping[str, Any]
"""What one model reads of a batch: ``input_ids``, ``attention_mask`` and more, each ``batch time``."""


def check_can_profile(spec: PipelineSpec) -> None:
    """Refuse a spec whose teachers do not run beside written steps in this process.

    Raises:
        SpecError: latent tokens, a store, teachers that are placed, or fp16 without a GPU.
    """
    if spec.trajectory == "latent":
        raise SpecError(
            "kava profile: trajectory: latent is not profiled; train a few steps, then `kava latents RUN`"
        )
    if spec.store is not None:
        raise SpecError("kava profile: a store holds targets that are aligned already; set store=null")
    for teacher in spec.teachers:
        if teacher.placement != "replicated":
            raise SpecError(f"kava profile: teacher {teacher.name!r}: placement must be replicated")
        if not teacher.has_weights:
            raise SpecError(
                f"kava profile: teacher {teacher.name!r}: stand_in 'token_identity' has no model whose "
                "attention could be looked at"
            )
    if spec.train.precision == "fp16" and not torch.cuda.is_available():
        raise SpecError("train.precision: fp16 needs a CUDA device; on CPU use fp32 or bf16")


def compares_caches(spec: PipelineSpec) -> bool:
    """Return whether some loss compares a teacher's cache."""
    return bool(spec.teachers and active_losses(spec))


@dataclass(frozen=True)
class PreparedVariant:
    """The models of a variant as they are before the first step.

    Teachers are given by their index in ``teachers``.
    """

    spec: PipelineSpec
    """With every model in its folder and every layer map measured."""
    data: Data
    distiller: Distiller
    """In evaluation mode, its projectors calibrated."""
    seed: int
    device: torch.device

    @property
    def pipeline(self) -> KVPipeline:
        """Return the pipeline, which every variant has that is profiled."""
        return self.distiller.pipeline

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Return the teachers in the order of the pipeline's aligners."""
        by_name = {teacher.name: teacher for teacher in self.distiller.teachers}
        return tuple(by_name[name] for name in self.pipeline.names)

    def validation_batches(self, count: int, size: int) -> Iterator[dict[str, Any]]:
        """Yield ``count`` validation examples, or as many as there are, ``size`` or fewer at a time."""
        for items in split_nearly_equal(self.data.validation_items.items[:count], size):
            yield send_to_device(self.data.plain_collator(items), self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Run models inside in the precision in which training runs them."""
        dtype = AUTOCAST_DTYPES[self.spec.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def compared_student_cache(self, side: Side) -> Cache:
        """Capture the student's keys, values and compared parts as losses and projectors see them.

        They are in the student's dtype.
        """
        parts = tuple(part for part in PARTS if part in (*KEYS_AND_VALUES, *self.pipeline.parts))
        return self._capture_student(side, parts, "keep" if self.spec.rotary == "keep" else "strip")[0]

    def attended_student_cache(self, side: Side) -> tuple[Cache, Rotation | None]:
        """Capture all the student's parts as its attention sees them, and how they were rotated."""
        return self._capture_student(side, PARTS, "match")

    def _capture_student(
        self, side: Side, parts: tuple[Part, ...], rotary: Literal["strip", "keep", "match"]
    ) -> tuple[Cache, Rotation | None]:
        model: Any = self.distiller.student
        capture = Capture(model, layers=self.pipeline.layers, parts=parts, rotary=rotary)
        with self.autocast(), capture:
            model.base_model(**_text_fields(side), use_cache=False)
        return capture.take(), capture.rotation()

    def attended_teacher_cache(self, index: int, side: Side) -> Cache:
        """Capture all parts of the layers that are read of a teacher, as its attention saw them."""
        model: Any = self.teachers[index].model
        layers = self.pipeline.teachers[index].sources
        capture = Capture(model, layers=layers, parts=PARTS, rotary="keep", stop=True)
        with self.autocast(), capture:
            model.base_model(**_text_fields(side), use_cache=False)
        return capture.take()

    def alignable_teacher_cache(self, index: int, side: Side) -> Cache:
        """Capture a teacher's keys and values, ready to be aligned."""
        with self.autocast():
            return self._key_value_teachers[index].cache(side).map(part_at_least_float32)

    @cached_property
    def key_value_aligners(self) -> list[TeacherAligner]:
        """Return aligners of keys and values: the pipeline's, or new ones if the losses compare one part."""
        return self.make_aligners(self.spec) if self.has_own_aligners else self.pipeline.teachers

    @property
    def has_own_aligners(self) -> bool:
        """Return whether attention needs more of the teachers than the losses compare."""
        return not set(KEYS_AND_VALUES) <= set(self.pipeline.parts)

    @cached_property
    def _key_value_teachers(self) -> list[Teacher]:
        """The same models, captured for keys and values whatever the losses compare."""
        teachers = []
        for teacher, aligner in zip(self.teachers, self.pipeline.teachers, strict=True):
            teachers.append(
                Teacher(
                    teacher.name,
                    teacher.model,
                    layers=aligner.sources,
                    parts=KEYS_AND_VALUES,
                    rotary=self.spec.rotary,
                )
            )
        return teachers

    def make_aligners(self, spec: PipelineSpec) -> list[TeacherAligner]:
        """Make new aligners of keys and values as ``spec`` has them, drawn from the seed and calibrated."""
        student = model_geometry(self.distiller.student)
        aligners = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for declared, teacher in zip(spec.teachers, self.teachers, strict=True):
                aligner = build_aligner(
                    declared.align,
                    name=declared.name,
                    teacher=model_geometry(teacher.model),
                    student=student,
                    layers=self.pipeline.layers,
                    parts=KEYS_AND_VALUES,
                )
                aligners.append(aligner)
        for index, aligner in enumerate(aligners):
            self._calibrate(aligner.eval().to(self.device), index)
        return aligners

    def _calibrate(self, aligner: TeacherAligner, index: int) -> None:
        if not aligner.wants_calibration:
            return
        items = self.data.train_items.items[: self.spec.train.calibration_examples]
        for some in split_nearly_equal(items, self.spec.train.batch_size):
            batch = send_to_device(self.data.plain_collator(some), self.device)
            teacher_side = batch["teachers"][aligner.name]
            teacher_cache = self.alignable_teacher_cache(index, teacher_side)
            student_cache = self.compared_student_cache(batch["student"]).pick(KEYS_AND_VALUES)
            student_cache = student_cache.map(part_at_least_float32)
            with without_autocast(self.device):
                own_sinks = self.pipeline.student_sinks(student_cache, token_mask(batch["student"]))
                time_map = plan_time_map(aligner, teacher_side, batch["student"], teacher_cache, own_sinks)
                aligner.observe(teacher_cache, student_cache, time_map)
        aligner.finish_calibration()


def plan_time_map(
    aligner: TeacherAligner,
    teacher: Side,
    student: Side,
    cache: Cache | None = None,
    student_sinks: Bool[Tensor, "batch time"] | None = None,
) -> TimeMap:
    """Return where the teacher's positions of a batch go.

    Args:
        aligner: of this teacher.
        teacher: its side of the batch.
        student: the student's.
        cache: the teacher's, by which its attention sinks are left out; None: first tokens alone are.
        student_sinks: to leave out as well.
    """
    time_map = aligner.plan(Timeline.from_batch(teacher), Timeline.from_batch(student))
    if cache is None:
        return time_map
    return aligner.without_sinks(time_map, cache, token_mask(teacher), student_sinks)


def _text_fields(side: Side) -> dict[str, Tensor]:
    return {name: side[name] for name in ("input_ids", "attention_mask")}


def prepare_variant(spec: PipelineSpec, maps: Path) -> PreparedVariant:
    """Load and calibrate a variant.

    Models to be pretrained are trained first; measured layer maps go into the folder ``maps``.

    Raises:
        SpecError: as ``check_can_profile``.
    """
    check_can_profile(spec)
    seed = spec.seeds[0]
    spec = with_pretrained_models(spec)
    data = make_data(spec)
    spec = with_measured_maps(spec, maps, data, seed=seed)
    distiller = make_distiller(spec, data, seed=seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller.to(device)
    distiller.place_teachers(device)
    calibrate_components(distiller, data, spec, device)
    return PreparedVariant(spec, data, distiller.eval(), seed, device)
