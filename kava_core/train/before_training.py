"""Show data to the components that want it, and set loss weights, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Subset

from kava_core.build.data import Data
from kava_core.build.time_plans import PlansTime
from kava_core.distill.calibration import (
    calibrate_hidden_states,
    calibrate_projectors,
    finish_projectors,
    show_fuser,
    show_losses,
)
from kava_core.distill.distiller import Distiller
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.protocols.fuser import ObservesTeachers
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.validation.gradient_shares import set_weights_by_share

WEIGHING_BATCHES = 4
"""Training batches from which loss weights are set."""


def calibrate_components(distiller: Distiller, data: Data, spec: PipelineSpec, device: torch.device) -> None:
    """Show the first training examples to projectors, then to fuser and losses, if they want to see data.

    The random state is left as it was. A store holds its projectors calibrated.
    """
    pipeline = distiller.pipeline
    if data.store is None and any(aligner.wants_calibration for aligner in pipeline.teachers):
        for batch in _calibration_batches(distiller, data, spec, device):
            calibrate_projectors(distiller, batch)
        finish_projectors(pipeline)
    if distiller.hidden is not None and distiller.hidden.wants_calibration:
        for batch in _calibration_batches(distiller, data, spec, device):
            calibrate_hidden_states(distiller, batch)
        distiller.hidden.finish_calibration()
    if isinstance(pipeline.fuser, ObservesTeachers):
        for batch in _calibration_batches(distiller, data, spec, device):
            show_fuser(distiller, batch)
        pipeline.finish_fuser()
    if pipeline.observes_caches:
        for batch in _calibration_batches(distiller, data, spec, device):
            show_losses(distiller, batch)
        pipeline.finish_losses()


def set_loss_weights(distiller: Distiller, data: Data, spec: PipelineSpec, device: torch.device) -> None:
    """Set λ of the terms that give a share of the gradient, from the first training batches."""
    if all(term.share is None for term in distiller.weighted_terms().values()):
        return
    batches = islice(_calibration_batches(distiller, data, spec, device), WEIGHING_BATCHES)
    with evaluation_mode(distiller):
        set_weights_by_share(distiller, list(batches))


def _calibration_batches(
    distiller: Distiller, data: Data, spec: PipelineSpec, device: torch.device
) -> Iterator[Any]:
    """Yield the first training examples, as evaluation collates them, and leave the random state alone."""
    count = min(spec.train.calibration_examples, len(data.train_items))
    items = Subset(data.train_items, range(count))
    collate = PlansTime(data.plain_collator, distiller.pipeline, distiller.hidden)
    with torch.random.fork_rng(devices=[]):
        for batch in DataLoader(items, spec.train.batch_size, collate_fn=collate):
            yield send_to_device(batch, device)
