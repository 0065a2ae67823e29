"""Define the values that aligning hands to comparing, and pick layers and parts of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.kv.align.boundaries import fuse_targets
from kava_core.kv.capture.rotation import Rotation
from kava_core.protocols.axes import Cache

ROUTER = "router"
"""Name of the term that a fuser adds to the loss."""


@dataclass(frozen=True)
class Aligned:
    """One teacher's target, and where it is valid."""

    target: Cache
    valid: Tensor
    """Bool ``batch time``."""
    ran: bool = True
    """False for a teacher that the fuser did not choose: nothing is valid."""


@dataclass(frozen=True)
class FuserInputs:
    """What no loss needs of a forward pass, but a fuser may."""

    hidden: Tensor | None = None
    """The student's last hidden states, ``batch time hidden``."""
    tasks: tuple[str, ...] | None = None
    """The task label of every example."""


NO_FUSER_INPUTS = FuserInputs()
"""For fusers that look at caches alone."""


def rotate_target(target: Cache, rotation: Rotation) -> Cache:
    """Keys and queries as the rotation's forward pass would have them."""
    return target.map(lambda x, part: x if part == "values" else rotation.apply(x))


def fuse_caches(targets: list[Cache], weights: Tensor) -> Cache:
    if len(targets) == 1:
        return targets[0]
    share = weights / weights.sum(0, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return targets[0].map(
        lambda x, part: fuse_targets(torch.stack([getattr(t, part) for t in targets]), share)
    )


def select_layers(cache: Cache, rows: Tensor, parts: tuple[Part, ...]) -> Cache:
    return cache.pick(parts).map(lambda x, _: x.index_select(1, rows))


def rows_of_loss(
    view: Cache, target: Cache, weight: Tensor, rows: Tensor, parts: tuple[Part, ...]
) -> tuple[Cache, Cache, Tensor]:
    """Student, target and weight of a loss's layers; the mean over layers is in the weight."""
    if len(rows) < weight.shape[1]:
        view, target = (cache.map(lambda x, _: x.index_select(1, rows)) for cache in (view, target))
        weight = weight.index_select(1, rows)
    return view.pick(parts), target.pick(parts), weight / len(rows)
