"""The whole pipeline on the meta device: every shape, no weights, no data, no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.pipeline import Aligned, KVPipeline, active, parts_of
from kava_core.kv.probe import probe_geometry
from kava_core.kv.timeline import ANSWER, PROMPT, REASONING, Timeline
from kava_core.kv.timemap import TimeMap
from kava_core.spec.model import ModelSpec, PipelineSpec, TrainTokenizer
from kava_core.train.assemble import make_pipeline
from kava_core.train.models import model_config


@dataclass(frozen=True)
class StageShape:
    """The cache after one stage."""

    teacher: str
    stage: str
    part: str
    shape: tuple[int, ...]
    """``batch layer head time dim``."""


@dataclass(frozen=True)
class DryRun:
    """What a forward pass of the pipeline would do."""

    student: Geometry
    teachers: dict[str, Geometry]
    pipeline: KVPipeline | None
    shapes: list[StageShape]


def geometry(model: ModelSpec, *, where: str) -> Geometry:
    """A model's geometry from its config alone."""
    return probe_geometry(sized_config(model, where=where))


def sized_config(model: ModelSpec, *, where: str) -> PreTrainedConfig:
    """The model's config; a tokenizer that is yet to be trained counts with its largest vocabulary."""
    config = model_config(model, where=where)
    if isinstance(model.tokenizer, TrainTokenizer) and "vocab_size" not in (model.config or {}):
        config.vocab_size = model.tokenizer.vocab_size
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


def dry_run(spec: PipelineSpec, *, batch: int, time: int, t_time: int) -> DryRun:
    """Align, fuse and compare meta tensors of these extents.

    Raises:
        SpecError, PluginError, UnsupportedModelError: what training would meet in its first step.
    """
    student = geometry(spec.student, where="student")
    teachers = {t.name: geometry(t, where=f"teacher {t.name!r}") for t in spec.teachers}
    if not active(spec):
        return DryRun(student, teachers, None, [])
    pipeline = make_pipeline(spec, teachers, student, seed=0)
    ours, theirs = timeline(batch, time), timeline(batch, t_time)
    maps = [_meta_map(aligner.plan(theirs, ours)) for aligner in pipeline.teachers]
    pipeline.to("meta")
    shapes: list[StageShape] = []
    caches = [
        meta_cache(spec, teachers[a.name], batch=batch, layer=len(a.sources), time=t_time)
        for a in pipeline.teachers
    ]
    for aligner, cache, time_map in zip(pipeline.teachers, caches, maps, strict=True):
        shapes += _record(aligner.name, "captured", cache)
        for stage, aligned in aligner.steps(cache, time_map):
            shapes += _record(aligner.name, stage, aligned)
    _compare(spec, pipeline, student, caches, maps, ours)
    return DryRun(student, teachers, pipeline, shapes)


def _compare(
    spec: PipelineSpec,
    pipeline: KVPipeline,
    student: Geometry,
    caches: list[Cache],
    maps: list[TimeMap],
    ours: Timeline,
) -> None:
    """Fuse and compare on the meta device, for the errors alone."""
    batch, time = ours.mask.shape
    own = meta_cache(spec, student, batch=batch, layer=len(pipeline.layers), time=time)
    aligned = [
        Aligned(aligner.align(cache, time_map), time_map.valid)
        for aligner, cache, time_map in zip(pipeline.teachers, caches, maps, strict=True)
    ]
    pipeline.compare(own, aligned, torch.ones((), device="meta"))


def timeline(batch: int, time: int) -> Timeline:
    """A stand-in batch without padding: a quarter prompt, then reasoning, an eighth answer."""
    positions = torch.arange(time).expand(batch, time)
    segments = torch.full((batch, time), REASONING)
    segments[:, : time // 4] = PROMPT
    segments[:, time - max(1, time // 8) :] = ANSWER
    spans = torch.stack([positions, positions + 1], -1)
    return Timeline(torch.ones(batch, time, dtype=torch.bool), positions, segments, spans)


def meta_cache(spec: PipelineSpec, geometry: Geometry, *, batch: int, layer: int, time: int) -> Cache:
    """A cache without values."""
    return Cache(
        **{
            part: torch.empty(batch, layer, geometry.heads(part), time, geometry.dim, device="meta")
            for part in parts_of(spec)
        }
    )


def _meta_map(time_map: TimeMap) -> TimeMap:
    index, weight, valid = (x.to("meta") for x in (time_map.index, time_map.weight, time_map.valid))
    return TimeMap(index, weight, valid, time_map.identity)


def _record(teacher: str, stage: str, cache: Cache) -> list[StageShape]:
    def shape(x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    return [StageShape(teacher, stage, part, shape(x)) for part, x in cache.items()]
