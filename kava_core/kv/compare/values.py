"""Define the values that aligning hands to comparing, and pick layers and parts of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.config import KVLossConfig, Part
from kava_core.kv.align.boundaries import fuse_targets
from kava_core.kv.capture.rotation import Rotation
from kava_core.protocols.axes import Cache

ROUTER = "router"
"""Name of the term that a fuser adds to the loss."""


@dataclass(frozen=True)
class Aligned:
    """One teacher's target, and where it is valid."""

    target: Cache
    valid: Bool[Tensor, "batch time"]
    ran: bool = True
    """False for a teacher that the fuser did not choose: nothing is valid."""


@dataclass(frozen=True)
class FuserInputs:
    """What no loss needs of the student's forward pass, but a fuser may."""

    hidden: Float[Tensor, "batch time hidden"] | None = None
    """The student's last hidden states."""
    tasks: tuple[str, ...] | None = None
    """The task label of every example."""


NO_FUSER_INPUTS = FuserInputs()
"""For fusers that look at caches alone."""


@dataclass(frozen=True)
class ComparedLoss:
    """One KV loss of the spec, and which of the compared layers it looks at."""

    term: str
    """Its name among the terms of the loss; two losses of one name are told apart by a number."""
    config: KVLossConfig
    rows: tuple[int, ...]
    """Places, among the compared layers, of those it looks at."""


def rotate_target(target: Cache, rotation: Rotation) -> Cache:
    """Return a target whose keys and queries are rotated as in a forward pass of the student."""
    return target.map(lambda x, part: x if part == "values" else rotation.apply(x))


def fuse_caches(targets: list[Cache], weights: Float[Tensor, "teacher batch layer time"]) -> Cache:
    """Return the weighted mean of all teachers' targets; the weights need not sum to 1."""
    if len(targets) == 1:
        return targets[0]
    total = weights.sum(0, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    share = weights / total

    def fuse_part(_: Tensor, part: Part) -> Tensor:
        return fuse_targets(torch.stack([getattr(target, part) for target in targets]), share)

    return targets[0].map(fuse_part)


def select_layers(cache: Cache, rows: Int[Tensor, " _"], parts: tuple[Part, ...]) -> Cache:
    """Return some layers and parts of a cache; ``rows`` are indices along the axis ``layer``."""
    return cache.pick(parts).map(lambda x, _: x.index_select(1, rows))


def inputs_of_loss(
    view: Cache,
    target: Cache,
    weight: Float[Tensor, "batch layer time"],
    rows: Int[Tensor, " _"],
    parts: tuple[Part, ...],
) -> tuple[Cache, Cache, Tensor]:
    """Return student, target and weight of the layers that a loss looks at.

    The weight is divided by the number of these layers, so that a loss's sum is their mean.

    Args:
        view: the student's cache where the losses compare, each part ``batch layer head time dim``.
        target: the teacher's, likewise.
        weight: of every position in every layer.
        rows: indices of the loss's layers among the compared ones.
        parts: which of keys, values and queries the loss compares.
    """
    if len(rows) < weight.shape[1]:
        view = view.map(lambda x, _: x.index_select(1, rows))
        target = target.map(lambda x, _: x.index_select(1, rows))
        weight = weight.index_select(1, rows)
    return view.pick(parts), target.pick(parts), weight / len(rows)
