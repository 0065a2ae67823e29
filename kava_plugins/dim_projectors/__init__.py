"""Built-in width projectors: ``t_dim → dim``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class Identity(ComponentConfig):
    """Heads are equally wide on both sides: nothing is done."""

    name: Literal["identity"] = "identity"
    component = "kava_plugins.dim_projectors.identity:Identity"


class Linear(ComponentConfig):
    """One matrix for each layer, trained with the student unless told otherwise.

    A projector trained only by the KV loss can absorb the mismatch: the loss falls, the student learns
    nothing.
    """

    name: Literal["linear"] = "linear"
    component = "kava_plugins.dim_projectors.linear:Linear"

    share_heads: bool = True
    """One matrix for all heads of a layer instead of one for each."""
    share_kv: bool = False
    """Keys and values go through the same matrix."""
    trainable: bool = True
    """Train the matrices with the student."""
    init: Literal["orthogonal", "random"] = "orthogonal"
    """``orthogonal``: lengths and angles are kept where widths allow; ``random``: normal with variance
    1 / t_dim."""
    seed: int = 0
    """Seed of the matrices."""


class Calibrated(ComponentConfig):
    """Computed from calibration batches before the first step, keys and values apart, then frozen."""

    name: Literal["calibrated"] = "calibrated"
    component = "kava_plugins.dim_projectors.calibrated:Calibrated"

    method: Literal["pca"] = "pca"
    """``pca``: mean removed, then the directions of largest variance."""
    per_head: bool = True
    """A basis for each head instead of one for each layer."""
    trainable: bool = False
    """Train the basis with the student after calibration."""


@hookimpl
def kava_dim_projectors() -> Sequence[type[ComponentConfig]]:
    """Register this package's width projectors."""
    return [Identity, Linear, Calibrated]
