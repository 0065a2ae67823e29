"""Built-in losses between the student's cache and the aligned target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from kava_core import hookimpl
from kava_core.config import KVLossConfig, Part

Scale = Literal["none", "batch", "example"]


class MSE(KVLossConfig):
    """Mean squared difference over heads and width (KaVa with p = 2, arXiv 2510.02312)."""

    name: Literal["mse"] = "mse"
    component = "kava_plugins.kv_losses.mse:MSE"

    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class SmoothL1(KVLossConfig):
    """Mean absolute difference, quadratic near zero (KaVa with p = 1, arXiv 2510.02312)."""

    name: Literal["smooth_l1"] = "smooth_l1"
    component = "kava_plugins.kv_losses.smooth_l1:SmoothL1"

    beta: float = Field(1.0, gt=0)
    """Differences below this are squared."""
    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class Mercator(KVLossConfig):
    """1 − cosine over the width of a head: directions count, lengths do not."""

    name: Literal["mercator"] = "mercator"
    component = "kava_plugins.kv_losses.mercator:Mercator"


class Relation(KVLossConfig):
    """Mean squared difference of cosine Gram matrices over time, heads merged.

    Neither head counts nor bases need agree. Relations between positions: MiniLMv2 (arXiv 2012.15828).
    """

    name: Literal["relation"] = "relation"
    component = "kava_plugins.kv_losses.relation:Relation"
    basis_free: ClassVar[bool] = True

    parts: tuple[Part, ...] = Field(("values",), min_length=1)
    """Which tensors are compared. Values alone were faster than keys and values in our runs."""
    center: bool = True
    """Remove each example's mean over time first."""


@hookimpl
def kava_kv_losses() -> Sequence[type[KVLossConfig]]:
    """Register this package's losses."""
    return [MSE, SmoothL1, Mercator, Relation]
