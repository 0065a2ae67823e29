"""The whole pipeline on the meta device: every shape, no weights, no data, no GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kava_core.build.pipeline import make_pipeline
from kava_core.data.tokenizers import load_tokenizer
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.capture.geometry import probe_geometry
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.streaming import assert_can_stream
from kava_core.kv.compare.values import Aligned
from kava_core.models.config import model_config
from kava_core.protocols.axes import Cache, Geometry, meta_cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import ANSWER, PROMPT, REASONING, Timeline
from kava_core.specfile.questions import active_losses, compared_parts
from kava_core.specfile.sections.models import ModelSpec, TrainTokenizer
from kava_core.specfile.sections.pipeline import PipelineSpec


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
    own: Cache = field(default_factory=Cache)
    """The student's cache of the layers looked at, without values."""
    caches: dict[str, Cache] = field(default_factory=dict)
    """Every teacher's captured cache, without values."""
    maps: dict[str, TimeMap] = field(default_factory=dict)
    """Every teacher's time map."""


def geometry(model: ModelSpec, *, where: str) -> Geometry:
    """A model's geometry from its config alone.

    Raises:
        SpecError: transformers makes no causal language model of this config.
        UnsupportedModelError: its cache cannot be captured.
    """
    config = sized_config(model, where=where)
    try:
        return probe_geometry(config)
    except (ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SpecError(f"{where}: {(lines or [type(error).__name__])[-1]}") from error


def sized_config(model: ModelSpec, *, where: str) -> PreTrainedConfig:
    """The model's config; a tokenizer that is yet to be trained counts with its largest vocabulary.

    A tokenizer that is no folder here, or cannot be loaded, leaves the config's default vocabulary.
    """
    config = model_config(model, stored_tokenizer(model), where=where)
    if vocabulary_note(model) == AT_MOST and isinstance(model.tokenizer, TrainTokenizer):
        config.get_text_config().vocab_size = model.tokenizer.vocab_size
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


AT_MOST, UNKNOWN = "(at most)", "(vocabulary unknown)"


def vocabulary_note(model: ModelSpec) -> str:
    """How far the vocabulary of ``sized_config`` can be trusted; empty where it is the run's."""
    if model.config is None or "vocab_size" in model.config:
        return ""
    if isinstance(model.tokenizer, TrainTokenizer):
        return AT_MOST
    return UNKNOWN if stored_tokenizer(model) is None else ""


def stored_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder that gives a ``config`` model its vocabulary; None where there is none."""
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
    student = geometry(spec.student, where="student")
    teachers = {t.name: geometry(t, where=f"teacher {t.name!r}") for t in spec.teachers}
    if not active_losses(spec):
        return DryRun(student, teachers, None, [])
    pipeline = make_pipeline(spec, teachers, student, seed=0)
    if spec.train.stream:
        assert_can_stream(pipeline)
    latent = spec.trajectory == "latent"
    ours = latent_timeline(batch, spec.latent.count) if latent else timeline(batch, time)
    time = ours.mask.shape[1]
    maps, caches = {}, {}
    for a in pipeline.teachers:
        length, time_map = _mapped(a, ours, t_time)
        maps[a.name] = time_map.to("meta")
        caches[a.name] = meta_cache(
            teachers[a.name], compared_parts(spec), batch=batch, layer=len(a.sources), time=length
        )
    pipeline.to("meta")
    own = meta_cache(student, compared_parts(spec), batch=batch, layer=len(pipeline.layers), time=time)
    walked = [_walk(aligner, caches[aligner.name], maps[aligner.name]) for aligner in pipeline.teachers]
    shapes = [shape for steps, _ in walked for shape in steps]
    pipeline.compare(own, [aligned for _, aligned in walked], torch.ones((), device="meta"))
    return DryRun(student, teachers, pipeline, shapes, own, caches, maps)


def _walk(aligner: TeacherAligner, cache: Cache, time_map: TimeMap) -> tuple[list[StageShape], Aligned]:
    """One teacher's shapes after every stage, and its target."""
    steps = [("captured", cache), *aligner.steps(cache, time_map)]
    shapes = [shape for stage, x in steps for shape in _record(aligner.name, stage, x)]
    return shapes, Aligned(steps[-1][1], time_map.valid)


def _mapped(aligner: TeacherAligner, ours: Timeline, t_time: int) -> tuple[int, TimeMap]:
    """The teacher's length and its time map: the student's where the warper evicts or takes no other."""
    batch, time = ours.mask.shape
    if aligner.evictor is not None:
        return time, aligner.plan(timeline(batch, t_time), ours)
    try:
        return t_time, aligner.plan(timeline(batch, t_time), ours)
    except Exception:  # a component can raise anything; at equal lengths it has no excuse
        return time, aligner.plan(timeline(batch, time), ours)


def timeline(batch: int, time: int) -> Timeline:
    """A stand-in batch without padding: a quarter prompt, then reasoning, an eighth answer."""
    positions = torch.arange(time).expand(batch, time)
    segments = torch.full((batch, time), REASONING)
    segments[:, : time // 4] = PROMPT
    segments[:, time - max(1, time // 8) :] = ANSWER
    spans = torch.stack([positions, positions + 1], -1)
    return Timeline(torch.ones(batch, time, dtype=torch.bool), positions, segments, spans)


def latent_timeline(batch: int, count: int) -> Timeline:
    """Latent tokens: all of them reasoning, without characters."""
    places = torch.arange(count).expand(batch, count)
    real, spans = torch.ones(batch, count, dtype=torch.bool), torch.zeros(batch, count, 2, dtype=torch.long)
    return Timeline(real, places, torch.full_like(places, REASONING), spans)


def _record(teacher: str, stage: str, cache: Cache) -> list[StageShape]:
    def shape(x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    return [StageShape(teacher, stage, part, shape(x)) for part, x in cache.items()]
