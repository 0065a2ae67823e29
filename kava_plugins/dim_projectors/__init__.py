"""Declare the built-in width projectors: ``t_dim → dim``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kava_core import hookimpl
from kava_core.config import ComponentConfig

Rate = Annotated[float, Field(gt=0)]


class IdentityConfig(ComponentConfig):
    """Leave every head as it is: both sides are equally wide.

    Formula: ``y = x``.

    Source: kava's own.
    """

    name: Literal["identity"] = "identity"
    component = "kava_plugins.dim_projectors.identity:Identity"


class LinearConfig(ComponentConfig):
    """Multiply every head by one matrix for each layer, trained with the student.

    Formula: ``y[layer, head, time, dim] = Σ_t_dim W[layer, dim, t_dim] · x[layer, head, time, t_dim]``.

    A projector trained only by the KV loss can absorb the mismatch: the loss falls, the student learns
    nothing.

    Source: Romero et al. 2015, arXiv 1412.6550 (FitNets: a trained map between layers of unequal width).
    """

    name: Literal["linear"] = "linear"
    component = "kava_plugins.dim_projectors.linear:Linear"

    share_heads: bool = True
    """One matrix for all heads of a layer instead of one for each."""
    share_kv: bool = False
    """Keys and values go through the same matrix."""
    trainable: bool = True
    """Train the matrices with the student."""
    learning_rate: Rate | None = None
    """Peak learning rate of the matrices; null: ``train.learning_rate``."""
    init: Literal["orthogonal", "random"] = "orthogonal"
    """``orthogonal``: lengths and angles are kept where widths allow; ``random``: normal with variance
    1 / t_dim."""
    seed: int = 0
    """Seed of the matrices."""


class ElasticConfig(ComponentConfig):
    """Send every head through a small network for each layer, trained with the student.

    Formula: ``y = W₂ · dropout(SiLU(W₁ · LayerNorm(x) + b₁)) + b₂``; from ``t_dim`` to
    ``round(mlp_ratio · dim)`` inner channels, then to ``dim``.

    A projector trained only by the KV loss can absorb the mismatch: the loss falls, the student learns
    nothing.

    Source: kava's own.
    """

    name: Literal["elastic"] = "elastic"
    component = "kava_plugins.dim_projectors.elastic:Elastic"

    mlp_ratio: Rate | Literal["auto"] = "auto"
    """Width inside, in units of the head width that comes out. ``auto``: 2.0 for teachers of 70 billion
    parameters or more, 1.0 from 7 billion, 0.5 below; by ``teacher_size``, or by the hidden width of the
    wider model (at least 8192, at least 3584, less), which tells these sizes apart in the Llama and Qwen
    families."""
    teacher_size: Rate | None = None
    """The teacher's parameters in billions, for ``mlp_ratio: auto``; null: guessed by the hidden width."""
    share_heads: bool = True
    """One bottleneck for all heads of a layer instead of one for each."""
    share_kv: bool = False
    """Keys and values go through the same bottleneck."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the inner channels set to zero while training."""
    learning_rate: Rate | None = None
    """Peak learning rate of the bottlenecks; null: ``train.learning_rate``."""
    seed: int = 0
    """Seed of the matrices."""

    @model_validator(mode="after")
    def _size_is_used(self) -> ElasticConfig:
        if self.teacher_size is not None and self.mlp_ratio != "auto":
            raise ValueError("teacher_size only says which ratio 'mlp_ratio: auto' means; leave out one")
        return self


class CalibratedConfig(ComponentConfig):
    """Compute a projection from calibration batches before the first step, then freeze it.

    Formula: with ``C_xx[t_dim, t_dim]`` and ``C_yx[dim, t_dim]``, the covariances of teacher x and student y:

    - ``pca``: ``y = B · (x − mean x)``; the rows of B are the first eigenvectors of C_xx
    - ``procrustes``: ``y = s · R · (x − mean x) + mean y``; ``R = U · Vᵀ`` with ``C_yx = U · Σ · Vᵀ``, and
      ``s = tr Σ / tr(R · C_xx · Rᵀ)``
    - ``ridge``: ``y = C_yx · (C_xx + ridge · (mean variance) · I)⁻¹ · (x − mean x) + mean y``

    Keys and values have projections of their own. ``procrustes`` and ``ridge`` map onto the other side's
    cache as it is before training: they are for a pretrained student. With one that starts from random
    weights there is only noise to fit.

    Source: Pearson 1901 (principal components), Schönemann 1966 (orthogonal Procrustes), Gower 1975 (its
    scale), Hoerl and Kennard 1970 (ridge regression).
    """

    name: Literal["calibrated"] = "calibrated"
    component = "kava_plugins.dim_projectors.calibrated:Calibrated"

    method: Literal["pca", "procrustes", "ridge"] = "pca"
    """``pca``: mean removed, then the directions of largest variance; ``procrustes``: rotated, scaled and
    shifted onto the other side's cache; ``ridge``: linear regression onto it."""
    ridge: Rate = 1e-3
    """Penalty of ``ridge``, in units of the mean variance of the channels that go in."""
    per_head: bool = True
    """A basis for each head instead of one for each layer."""
    trainable: bool = False
    """Train the basis with the student after calibration."""
    learning_rate: Rate | None = None
    """Peak learning rate of the basis, with ``trainable``; null: ``train.learning_rate``."""


@hookimpl
def kava_dim_projectors() -> Sequence[type[ComponentConfig]]:
    """Register this package's width projectors."""
    return [IdentityConfig, LinearConfig, ElasticConfig, CalibratedConfig]
