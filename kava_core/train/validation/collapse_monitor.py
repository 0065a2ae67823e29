"""The collapse monitor: at every evaluation, what the aligner did and what the student did."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from kava_core.distill.calibration import aligned_targets, student_cache_without_dropout
from kava_core.distill.distiller import Distiller
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
"""Validation examples that are looked at."""


class CollapseMonitor:
    """Measures a few fixed examples against the state before the first step.

    Args:
        file: where that state is kept, for a run that is resumed: the aligners' weights and the student's
            cache of the examples. Written only where an aligner or a loss is trained.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, distiller: Distiller, batch: Mapping[str, Any]) -> None:
        """Keep the state before the first step."""
        if PartialState().is_main_process and distiller.pipeline.trains_without_student:
            draft = self.file.with_suffix(".draft")
            save_file(_state(distiller, batch), draft)
            os.replace(draft, self.file)
        PartialState().wait_for_everyone()

    @torch.no_grad()
    def __call__(self, distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
        """``collapse/TEACHER/PART/…`` for every teacher and part, and ``collapse/absorbed``."""
        pipeline = distiller.pipeline
        if not pipeline.compared:
            return {}
        student, aligned = (
            student_cache_without_dropout(distiller, batch["student"]),
            _aligned(distiller, pipeline, batch),
        )
        found = _measures(pipeline, student, aligned)
        if pipeline.trains_without_student and self.file.exists():
            found |= self._against_the_start(distiller, batch, student, aligned)
        return {f"{PREFIX}/{name}": value for name, value in found.items() if not math.isnan(value)}

    def _against_the_start(
        self, distiller: Distiller, batch: Mapping[str, Any], student: Cache, aligned: list[Aligned]
    ) -> dict[str, float]:
        now = distiller.pipeline
        saved = load_file(self.file, device=str(student.any.device))
        first = copy.deepcopy(now)
        first.load_state_dict({k.removeprefix("pipeline."): v for k, v in saved.items() if "pipeline." in k})
        then = Cache(**{part: saved[part] for part in PARTS if part in saved})
        frozen = _aligned(distiller, first, batch)
        timeline = Timeline.from_batch(batch["student"])
        share = absorbed_share(
            _loss(first, then, frozen, timeline),
            _loss(now, then, aligned, timeline),
            _loss(now, student, aligned, timeline),
        )
        return _frozen_cosines(first, student, frozen) | {"absorbed": float(share)}


def _state(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {f"pipeline.{name}": value for name, value in distiller.pipeline.state_dict().items()}
    cache = dict(student_cache_without_dropout(distiller, batch["student"]).items())
    return {name: value.detach().contiguous().cpu() for name, value in (weights | cache).items()}


def _aligned(distiller: Distiller, pipeline: KVPipeline, batch: Mapping[str, Any]) -> list[Aligned]:
    return aligned_targets(distiller, batch, pipeline)


def _loss(pipeline: KVPipeline, student: Cache, aligned: list[Aligned], timeline: Timeline) -> Tensor:
    """With all teachers counting alike, whatever the fuser says: this is about aligners."""
    valid = torch.stack([one.valid for one in aligned]).float()
    weights = valid / (valid.sum(0).clamp_min(1) * timeline.mask.sum())
    return pipeline.weighted_total(pipeline.terms_with_weights(student, aligned, weights))


def _measures(pipeline: KVPipeline, student: Cache, aligned: list[Aligned]) -> dict[str, float]:
    found = {}
    for aligner, one in zip(pipeline.teachers, aligned, strict=True):
        views = dict(aligner.view_of(student).items())
        for part, target in one.target.items():
            rows, own = valid_rows(target, one.valid), valid_rows(views[part], one.valid)
            if not rows.shape[2]:
                continue
            found[f"{aligner.name}/{part}/rank"] = float(effective_rank(rows).mean())
            found[f"{aligner.name}/{part}/variance"] = float(mean_variance(rows))
            if own.shape == rows.shape:
                found[f"{aligner.name}/{part}/cosine"] = float(mean_cosine(own, rows))
    return found


def _frozen_cosines(first: KVPipeline, student: Cache, frozen: list[Aligned]) -> dict[str, float]:
    """Cosines through the aligners as they were before the first step."""
    measures = _measures(first, student, frozen)
    return {
        name.replace("/cosine", "/frozen_cosine"): value
        for name, value in measures.items()
        if name.endswith("/cosine")
    }
