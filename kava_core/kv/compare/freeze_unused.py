"""Freeze parameters that no loss reaches: distributed training waits for gradients that never come."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import SpecError
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import ROUTER, Aligned
from kava_core.protocols.axes import Geometry, meta_cache
from kava_core.protocols.fuser import Rewarded
from kava_core.protocols.time_map import TimeMap

BATCH, TIME = 1, 2


def freeze_unused(pipeline: KVPipeline, *, parts: tuple[Part, ...], student: Geometry) -> None:
    """Freeze every parameter that a backward pass of a copy on the meta device leaves without gradient.

    For instance the keys' matrix of a projector, if only values are compared.

    Args:
        pipeline: changed in place.
        parts: what the losses compare.
        student: the student's geometry.

    Raises:
        SpecError: the fuser is trained, but no loss gives it a gradient.
    """
    if not any(parameter.requires_grad for parameter in pipeline.parameters()):
        return
    probe = copy.deepcopy(pipeline).to("meta")
    time_map = TimeMap.same(torch.ones(BATCH, TIME, dtype=torch.bool, device="meta"))
    cache = partial(meta_cache, parts=parts, batch=BATCH, time=TIME)
    run = (True,) * len(probe.names) if probe.draws_teachers else pipeline.choose_teachers()
    aligned = []
    for aligner, runs in zip(probe.teachers, run, strict=True):
        if runs:
            teacher = cache(aligner.teacher, layer=len(aligner.sources))
            aligned.append(Aligned(aligner.align(teacher, time_map), time_map.valid))
        else:
            aligned.append(probe.empty_target(aligner, time_map.valid))
    terms = probe.compare(cache(student, layer=len(probe.layers)), aligned, torch.ones((), device="meta"))
    _check_router(probe, terms)
    probe.weighted_total(terms).backward()
    reached = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    for name, parameter in pipeline.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in reached)


def _check_router(probe: KVPipeline, terms: dict[str, Tensor]) -> None:
    """Refuse a router that no loss moves: it would look like one that found no difference."""
    trained = [p for p in probe.fuser.parameters() if p.requires_grad]
    if not trained or isinstance(probe.fuser, Rewarded):
        return
    losses = probe.weighted_total({name: term for name, term in terms.items() if name != ROUTER})
    gradients: Sequence[Tensor | None] = [None]
    if losses.requires_grad:
        gradients = torch.autograd.grad(losses, trained, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        names = ", ".join(config.name for config in probe.configs)
        raise SpecError(
            f"fuser {probe.fuser_config.name!r} is trained, but no loss ({names}) gives it a gradient"
        )
