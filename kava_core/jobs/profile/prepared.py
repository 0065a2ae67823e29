"""One variant made ready: real models, calibrated aligners, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kava_core.build.aligner import build_aligner
from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.layer_maps import with_measured_maps
from kava_core.config import Part
from kava_core.data.dataset import split_nearly_equal
from kava_core.distill.distiller import Distiller
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
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.questions import active_losses
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train import run

BOTH: tuple[Part, ...] = ("keys", "values")
"""What attention needs of a teacher, whatever the losses compare."""

Side = Mapping[str, Any]


def refuse(spec: PipelineSpec) -> None:
    """SpecError for a spec whose teachers do not run beside written steps in this process."""
    if spec.trajectory == "latent":
        raise SpecError(
            "kava profile: trajectory: latent is not profiled; train a few steps, then `kava latents RUN`"
        )
    if spec.store is not None:
        raise SpecError("kava profile: a store holds targets that are aligned already; set store=null")
    placed = [t for t in spec.teachers if t.placement != "replicated"]
    if placed:
        raise SpecError(f"kava profile: teacher {placed[0].name!r}: placement must be replicated")
    if spec.train.precision == "fp16" and not torch.cuda.is_available():
        raise SpecError("train.precision: fp16 needs a CUDA device; on CPU use fp32 or bf16")


def compares(spec: PipelineSpec) -> bool:
    """Whether some loss compares a teacher's cache."""
    return bool(spec.teachers and active_losses(spec))


@dataclass(frozen=True)
class Subject:
    """The models of a variant as they are before the first step."""

    spec: PipelineSpec
    """With every model in its folder and every layer map measured."""
    data: Data
    distiller: Distiller
    """In evaluation mode, its projectors calibrated."""
    seed: int
    device: torch.device

    @property
    def pipeline(self) -> KVPipeline:
        """Every variant that is profiled has one."""
        return self.distiller.pipeline

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """In the order of the pipeline's aligners."""
        found: tuple[Teacher, ...] = self.distiller.teachers
        return tuple(next(t for t in found if t.name == name) for name in self.pipeline.names)

    def batches(self, count: int, size: int) -> Iterator[dict[str, Any]]:
        """``count`` validation examples, or as many as there are, ``size`` or fewer at a time."""
        for some in split_nearly_equal(self.data.validation_items.items[:count], size):
            yield send_to_device(self.data.plain_collator(some), self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which training runs the models."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.spec.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def compared(self, side: Side) -> Cache:
        """The student's keys, values and compared parts as losses and projectors see them, in its dtype."""
        parts = tuple(part for part in PARTS if part in (*BOTH, *self.pipeline.parts))
        return self._own(side, parts, "keep" if self.spec.rotary == "keep" else "strip")[0]

    def attended(self, side: Side) -> tuple[Cache, Rotation | None]:
        """All the student's parts as its attention sees them, and how they were rotated."""
        return self._own(side, PARTS, "match")

    def _own(self, side: Side, parts: tuple[Part, ...], rotary: Any) -> tuple[Cache, Rotation | None]:
        model: Any = self.distiller.student
        capture = Capture(model, layers=self.pipeline.layers, parts=parts, rotary=rotary)
        with self.autocast(), capture:
            model.base_model(**_text(side), use_cache=False)
        return capture.take(), capture.rotation()

    def raw(self, place: int, side: Side) -> Cache:
        """All parts of the layers that are read of a teacher, as its attention saw them."""
        model: Any = self.teachers[place].model
        layers = self.pipeline.teachers[place].sources
        capture = Capture(model, layers=layers, parts=PARTS, rotary="keep", stop=True)
        with self.autocast(), capture:
            model.base_model(**_text(side), use_cache=False)
        return capture.take()

    def cache(self, place: int, side: Side) -> Cache:
        """A teacher's keys and values, ready to be aligned."""
        with self.autocast():
            return self._readers[place].cache(side).map(part_at_least_float32)

    @cached_property
    def whole(self) -> list[TeacherAligner]:
        """Aligners of keys and values: the pipeline's, or, where losses compare one part only, new ones."""
        return self.aligners(self.spec) if self.apart else self.pipeline.teachers

    @property
    def apart(self) -> bool:
        """Whether attention needs more of the teachers than the losses compare."""
        return not set(BOTH) <= set(self.pipeline.parts)

    @cached_property
    def _readers(self) -> list[Teacher]:
        return [
            Teacher(t.name, t.model, layers=a.sources, parts=BOTH, rotary=self.spec.rotary)
            for t, a in zip(self.teachers, self.pipeline.teachers, strict=True)
        ]

    def aligners(self, spec: PipelineSpec) -> list[TeacherAligner]:
        """New aligners of keys and values as ``spec`` has them, drawn from the seed and calibrated."""
        own = model_geometry(self.distiller.student)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = [
                build_aligner(
                    teacher.align,
                    name=teacher.name,
                    teacher=model_geometry(model.model),
                    student=own,
                    layers=self.pipeline.layers,
                    parts=BOTH,
                )
                for teacher, model in zip(spec.teachers, self.teachers, strict=True)
            ]
        for place, aligner in enumerate(made):
            self._calibrate(aligner.eval().to(self.device), place)
        return made

    def _calibrate(self, aligner: TeacherAligner, place: int) -> None:
        if not aligner.wants_calibration:
            return
        items = self.data.train_items.items[: self.spec.train.calibration_examples]
        for some in split_nearly_equal(items, self.spec.train.batch_size):
            batch = send_to_device(self.data.plain_collator(some), self.device)
            theirs = batch["teachers"][aligner.name]
            cache, own = (
                self.cache(place, theirs),
                self.compared(batch["student"]).pick(BOTH).map(part_at_least_float32),
            )
            with without_autocast(self.device):
                aligner.observe(cache, own, time_map_of(aligner, theirs, batch["student"]))
        aligner.dim_projector.finish()


def time_map_of(aligner: TeacherAligner, theirs: Side, own: Side) -> Any:
    """The time map of a batch."""
    return aligner.plan(Timeline.from_batch(theirs), Timeline.from_batch(own))


def _text(side: Side) -> dict[str, Tensor]:
    return {name: side[name] for name in ("input_ids", "attention_mask")}


def make_subject(spec: PipelineSpec, maps: Path) -> Subject:
    """Models to be pretrained are trained first; measured layer maps go into the folder ``maps``."""
    refuse(spec)
    seed = spec.seeds[0]
    spec = run.with_trained_models(spec)
    data = make_data(spec)
    spec = with_measured_maps(spec, maps, data, seed=seed)
    distiller = make_distiller(spec, data, seed=seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller.to(device)
    distiller.place_teachers(device)
    run.calibrate(distiller, data, spec, device)
    return Subject(spec, data, distiller.eval(), seed, device)
