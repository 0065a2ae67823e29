"""Monitor collapse: measure at every evaluation what the aligner did and what the student did."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save
from torch import Tensor

from kava_core.distill.calibration import aligned_targets, student_cache_without_dropout
from kava_core.distill.distiller import Distiller
from kava_core.files import replace_file
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import Aligned
from kava_core.kv.maths.rank_and_cosine import (
    absorbed_share,
    effective_rank,
    mean_cosine,
    mean_variance,
    valid_rows,
)
from kava_core.protocols.axes import PARTS, Cache
from kava_core.protocols.timeline import Timeline

PREFIX = "collapse"
EXAMPLES = 8
"""Validation examples that are measured."""


class CollapseMonitor:
    """Measures a few fixed examples against the state before the first step.

    Args:
        file: where that state is kept, for a run that is resumed: the aligners' weights and the student's
            cache of the examples. Written only if an aligner or a loss is trained.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, distiller: Distiller, batch: Mapping[str, Any]) -> None:
        """Keep the state before the first step."""
        if PartialState().is_main_process and distiller.pipeline.trains_without_student:
            replace_file(self.file, save(_first_state(distiller, batch)))
        PartialState().wait_for_everyone()

    @torch.no_grad()
    def __call__(self, distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return ``collapse/TEACHER/PART/…`` for every teacher and part, and ``collapse/absorbed``."""
        pipeline = distiller.pipeline
        if not pipeline.compared:
            return {}
        student = student_cache_without_dropout(distiller, batch["student"])
        aligned = aligned_targets(distiller, batch)
        measures = _measure_parts(pipeline, student, aligned)
        if pipeline.trains_without_student and self.file.exists():
            measures |= self._compare_with_start(distiller, batch, student, aligned)
        return {f"{PREFIX}/{name}": value for name, value in measures.items() if not math.isnan(value)}

    def _compare_with_start(
        self, distiller: Distiller, batch: Mapping[str, Any], student: Cache, aligned: list[Aligned]
    ) -> dict[str, float]:
        """Return ``absorbed``, and cosines through the aligners as they were before the first step."""
        pipeline = distiller.pipeline
        saved = load_file(self.file, device=str(student.any.device))
        weights: dict[str, Tensor] = {}
        for name, tensor in saved.items():
            if "pipeline." in name:
                weights[name.removeprefix("pipeline.")] = tensor
        first_pipeline = copy.deepcopy(pipeline)
        first_pipeline.load_state_dict(weights)
        first_student = Cache(**{part: saved[part] for part in PARTS if part in saved})
        first_aligned = aligned_targets(distiller, batch, first_pipeline)
        timeline = Timeline.from_batch(batch["student"])
        share = absorbed_share(
            _unrouted_loss(first_pipeline, first_student, first_aligned, timeline),
            _unrouted_loss(pipeline, first_student, aligned, timeline),
            _unrouted_loss(pipeline, student, aligned, timeline),
        )
        return _frozen_cosines(first_pipeline, student, first_aligned) | {"absorbed": float(share)}


def _first_state(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the pipeline's weights and the student's cache, to be saved."""
    state = {f"pipeline.{name}": value for name, value in distiller.pipeline.state_dict().items()}
    state |= dict(student_cache_without_dropout(distiller, batch["student"]).items())
    return {name: value.detach().contiguous().cpu() for name, value in state.items()}


def _unrouted_loss(
    pipeline: KVPipeline, student: Cache, aligned: list[Aligned], timeline: Timeline
) -> Tensor:
    """Return the KV loss with all teachers counting alike, whatever the fuser chooses.

    This is about aligners.
    """
    valid = torch.stack([target.valid for target in aligned]).float()
    weights = valid / (valid.sum(0).clamp_min(1) * timeline.mask.sum())
    return pipeline.weighted_total(pipeline.terms_with_weights(student, aligned, weights))


def _measure_parts(pipeline: KVPipeline, student: Cache, aligned: list[Aligned]) -> dict[str, float]:
    """Return rank, variance and cosine of every teacher's and part's target."""
    measures = {}
    for aligner, of_teacher in zip(pipeline.teachers, aligned, strict=True):
        views = dict(aligner.view_of(student).items())
        for part, target in of_teacher.target.items():
            target_rows = valid_rows(target, of_teacher.valid)
            student_rows = valid_rows(views[part], of_teacher.valid)
            if not target_rows.shape[2]:
                continue
            name = f"{aligner.name}/{part}"
            measures[f"{name}/rank"] = float(effective_rank(target_rows).mean())
            measures[f"{name}/variance"] = float(mean_variance(target_rows))
            if student_rows.shape == target_rows.shape:
                measures[f"{name}/cosine"] = float(mean_cosine(student_rows, target_rows))
    return measures


def _frozen_cosines(
    first_pipeline: KVPipeline, student: Cache, first_aligned: list[Aligned]
) -> dict[str, float]:
    """Return cosines through the aligners as they were before the first step."""
    cosines = {}
    for name, value in _measure_parts(first_pipeline, student, first_aligned).items():
        if name.endswith("/cosine"):
            cosines[name.replace("/cosine", "/frozen_cosine")] = value
    return cosines
