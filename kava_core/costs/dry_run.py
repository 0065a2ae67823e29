"""Run the whole pipeline on the meta device: every shape, no weights, no data, no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kava_core.build.aligned_states import PARTS, build_aligned_states, state_geometry
from kava_core.build.pipeline import make_pipeline
from kava_core.data.tokenizers import load_tokenizer
from kava_core.distill.aligned_states import HIDDEN, AlignedStates
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.streaming import assert_can_stream
from kava_core.kv.compare.values import Aligned
from kava_core.models.assembled.cut_config import model_depth
from kava_core.models.assembled.kept_layers import is_measured, kept_layers
from kava_core.models.config import config_geometry, model_config, whole_config
from kava_core.protocols.axes import Cache, Geometry, meta_cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import ANSWER, PROMPT, REASONING, Timeline
from kava_core.specfile.questions import active_losses, compared_parts, hidden_teachers
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec

AT_MOST, UNKNOWN = "(at most)", "(vocabulary unknown)"


@dataclass(frozen=True)
class StageShape:
    """The shape of one part of a teacher's cache, or of its hidden states, after one stage."""

    teacher: str
    stage: str
    part: str
    """Keys, values or queries; ``hidden`` for hidden states."""
    shape: tuple[int, ...]
    """``batch layer head time dim``."""


@dataclass(frozen=True)
class DryHidden:
    """What aligns hidden states, on the meta device, and what it reads."""

    states: AlignedStates
    student: Cache
    """The student's states of the compared layers, without values."""
    teachers: dict[str, Cache]
    """The states that every teacher's aligner reads, without values."""
    time_maps: dict[str, TimeMap]


@dataclass(frozen=True)
class DryRun:
    """A pipeline on the meta device, and what a forward pass of it reads."""

    student: Geometry
    teachers: dict[str, Geometry]
    pipeline: KVPipeline | None
    """None if no loss compares caches."""
    shapes: list[StageShape] = field(default_factory=list)
    """Of every stage, if the pass was run."""
    student_cache: Cache = field(default_factory=Cache)
    """The student's cache of the compared layers, without values."""
    teacher_caches: dict[str, Cache] = field(default_factory=dict)
    """Every teacher's captured cache, without values."""
    time_maps: dict[str, TimeMap] = field(default_factory=dict)
    """Every teacher's time map."""
    hidden: DryHidden | None = None
    """None if no hidden states are distilled."""

    @property
    def beside_student(self) -> nn.ModuleList:
        """Return what aligns and routes, as far as the run has any of it."""
        of_states = None if self.hidden is None else self.hidden.states
        return nn.ModuleList(module for module in (self.pipeline, of_states) if module is not None)

    def aligner(self, teacher: str) -> TeacherAligner:
        """Return the aligner of the teacher with this name."""
        assert self.pipeline is not None
        return next(aligner for aligner in self.pipeline.teachers if aligner.name == teacher)


def sized_config(model: ModelSpec, *, where: str) -> PreTrainedConfig:
    """Make the model's config; a tokenizer that is yet to be trained counts with its largest vocabulary.

    A tokenizer that is no local folder, or cannot be loaded, leaves the config's default vocabulary.
    """
    config = model_config(model, stored_tokenizer(model), where=where)
    if vocabulary_note(model) == AT_MOST and isinstance(model.tokenizer, TrainTokenizer):
        config.get_text_config().vocab_size = model.tokenizer.vocab_size
        # The default special tokens may have larger numbers than this vocabulary.
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def vocabulary_note(model: ModelSpec) -> str:
    """Return how far the vocabulary of ``sized_config`` can be trusted; empty if it is the run's."""
    if model.config is None or "vocab_size" in model.config:
        return ""
    if isinstance(model.tokenizer, TrainTokenizer):
        return AT_MOST
    return UNKNOWN if stored_tokenizer(model) is None else ""


def layers_note(model: ModelSpec, *, where: str) -> str:
    """Return which layers a model is cut down to; empty for a whole model."""
    asked = model.keep_layers
    if asked is None:
        return ""
    depth = model_depth(whole_config(model, where=where), where=where)
    kept = kept_layers(asked, depth, where=where)
    chosen = "by influence" if is_measured(asked) else ", ".join(map(str, kept))
    return f"({len(kept)} of {depth} layers: {chosen})"


def stored_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder that gives a ``config`` model its vocabulary; None if there is none."""
    if model.config is None or not isinstance(model.tokenizer, str) or not Path(model.tokenizer).is_dir():
        return None
    try:
        return load_tokenizer(model.tokenizer)
    except SpecError:
        return None


def dry_run(spec: PipelineSpec, *, batch: int, time: int, t_time: int) -> DryRun:
    """Align, fuse and compare meta tensors of these extents.

    Raises:
        SpecError, PluginError, UnsupportedModelError: what training would meet in its first step.
    """
    dry = dry_pipeline(spec, batch=batch, time=time, t_time=t_time)
    shapes = [] if dry.hidden is None else _run_hidden(dry.hidden)
    if dry.pipeline is None:
        return replace(dry, shapes=shapes)
    targets: list[Aligned] = []
    for aligner in dry.pipeline.teachers:
        time_map, cache = dry.time_maps[aligner.name], dry.teacher_caches[aligner.name]
        stages = [("captured", cache), *aligner.steps(cache, time_map)]
        shapes += _stage_shapes(aligner.name, stages)
        _, target = stages[-1]
        targets.append(Aligned(target, time_map.valid))
    dry.pipeline.compare(dry.student_cache, targets, torch.ones((), device="meta"))
    return replace(dry, shapes=shapes)


def _run_hidden(hidden: DryHidden) -> list[StageShape]:
    """Align and compare hidden states; return the shapes of every stage."""
    shapes = []
    for aligner in hidden.states.teachers:
        time_map, cache = hidden.time_maps[aligner.name], hidden.teachers[aligner.name]
        for stage, aligned in [("captured", cache), *aligner.steps(cache, time_map)]:
            shapes.append(StageShape(aligner.name, stage, HIDDEN, tuple(aligned.any.shape)))
        hidden.states.distance(aligner, hidden.student, cache, time_map)
    return shapes


def dry_pipeline(spec: PipelineSpec, *, batch: int, time: int, t_time: int) -> DryRun:
    """Make the pipeline, and caches and time maps of these extents, on the meta device; nothing is run.

    Raises:
        SpecError, PluginError, UnsupportedModelError: what training would meet before its first step.
    """
    student = config_geometry(sized_config(spec.student, where="student"), where="student")
    teachers = _teacher_geometries(spec)
    hidden = _dry_hidden(spec, teachers, student, unpadded_timeline(batch, time), t_time)
    if not active_losses(spec):
        return DryRun(student, teachers, None, hidden=hidden)
    pipeline = make_pipeline(spec, teachers, student, seed=0)
    if spec.train.stream:
        assert_can_stream(pipeline)
    if spec.trajectory == "latent":
        student_timeline = latent_timeline(batch, spec.latent.count)
    else:
        student_timeline = unpadded_timeline(batch, time)
    parts = compared_parts(spec)
    time_maps: dict[str, TimeMap] = {}
    teacher_caches: dict[str, Cache] = {}
    for aligner in pipeline.teachers:
        length, time_map = _plan_time_map(aligner, student_timeline, t_time)
        time_maps[aligner.name] = time_map.to("meta")
        teacher_caches[aligner.name] = meta_cache(
            teachers[aligner.name], parts, batch=batch, layer=len(aligner.sources), time=length
        )
    pipeline.to("meta")
    compared_time = student_timeline.mask.shape[1]
    student_cache = meta_cache(student, parts, batch=batch, layer=len(pipeline.layers), time=compared_time)
    return DryRun(
        student,
        teachers,
        pipeline,
        student_cache=student_cache,
        teacher_caches=teacher_caches,
        time_maps=time_maps,
        hidden=hidden,
    )


def _dry_hidden(
    spec: PipelineSpec, teachers: Mapping[str, Geometry], student: Geometry, timeline: Timeline, t_time: int
) -> DryHidden | None:
    names = hidden_teachers(spec)
    if not names:
        return None
    chosen = {name: teachers[name] for name in names}
    states = build_aligned_states(
        spec,
        chosen,
        student,
        seed=0,
        outputs={name: range(1, geometry.layer + 1) for name, geometry in chosen.items()},
        student_outputs=range(1, student.layer + 1),
    )
    batch, time = timeline.mask.shape
    time_maps, caches = {}, {}
    for aligner in states.teachers:
        length, time_map = _plan_time_map(aligner, timeline, t_time)
        time_maps[aligner.name] = time_map.to("meta")
        extents = state_geometry(chosen[aligner.name])
        caches[aligner.name] = meta_cache(
            extents, PARTS, batch=batch, layer=len(aligner.sources), time=length
        )
    own = meta_cache(state_geometry(student), PARTS, batch=batch, layer=states.layers, time=time)
    return DryHidden(states.to("meta"), own, caches, time_maps)


def _teacher_geometries(spec: PipelineSpec) -> dict[str, Geometry]:
    geometries = {}
    for teacher in spec.teachers:
        where = f"teacher {teacher.name!r}"
        geometries[teacher.name] = config_geometry(sized_config(teacher, where=where), where=where)
    return geometries


def _plan_time_map(aligner: TeacherAligner, student: Timeline, t_time: int) -> tuple[int, TimeMap]:
    """Return the length of the teacher's cache and its time map.

    That length is the student's if the warper evicts, or accepts no other.
    """
    batch, time = student.mask.shape
    if aligner.evictor is not None:
        return time, aligner.plan(unpadded_timeline(batch, t_time), student)
    try:
        return t_time, aligner.plan(unpadded_timeline(batch, t_time), student)
    except Exception:  # a component can raise anything; at equal lengths it has no excuse
        return time, aligner.plan(unpadded_timeline(batch, time), student)


def unpadded_timeline(batch: int, time: int) -> Timeline:
    """Make up a text of ``time`` tokens: a quarter prompt, then reasoning, an eighth answer."""
    positions = torch.arange(time).expand(batch, time)
    segments = torch.full((batch, time), REASONING)
    segments[:, : time // 4] = PROMPT
    segments[:, time - max(1, time // 8) :] = ANSWER
    spans = torch.stack([positions, positions + 1], -1)
    return Timeline(torch.ones(batch, time, dtype=torch.bool), positions, segments, spans)


def latent_timeline(batch: int, count: int) -> Timeline:
    """Make up ``count`` latent tokens: all of them reasoning, without characters."""
    positions = torch.arange(count).expand(batch, count)
    mask = torch.ones(batch, count, dtype=torch.bool)
    spans = torch.zeros(batch, count, 2, dtype=torch.long)
    return Timeline(mask, positions, torch.full_like(positions, REASONING), spans)


def _stage_shapes(teacher: str, stages: list[tuple[str, Cache]]) -> list[StageShape]:
    shapes = []
    for stage, cache in stages:
        for part, tensor in cache.items():
            shapes.append(StageShape(teacher, stage, part, tuple(tensor.shape)))
    return shapes
