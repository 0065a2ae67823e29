"""Built-in width projectors: ``t_dim → dim``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kava_core import hookimpl
from kava_core.config import ComponentConfig

Rate = Annotated[float, Field(gt=0)]


class IdentityConfig(ComponentConfig):
    """Heads are equally wide on both sides: nothing is done."""

    name: Literal["identity"] = "identity"
    component = "kava_plugins.dim_projectors.identity:Identity"


class LinearConfig(ComponentConfig):
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
    learning_rate: Rate | None = None
    """Peak learning rate of the matrices; null: ``train.learning_rate``."""
    init: Literal["orthogonal", "random"] = "orthogonal"
    """``orthogonal``: lengths and angles are kept where widths allow; ``random``: normal with variance
    1 / t_dim."""
    seed: int = 0
    """Seed of the matrices."""


class ElasticConfig(ComponentConfig):
    """A bottleneck for each layer, trained with the student: LayerNorm, Linear, SiLU, Dropout, Linear.

    A projector trained only by the KV loss can absorb the mismatch: the loss falls, the student learns
    nothing.
    """

    name: Literal["elastic"] = "elastic"
    component = "kava_plugins.dim_projectors.elastic:Elastic"

    mlp_ratio: Rate | Literal["auto"] = "auto"
    """Width inside, in units of the head width that comes out. ``auto``: 2.0 for teachers of 70 billion
    parameters or more, 1.0 from 7 billion, 0.5 below; by ``teacher_size``, or by the hidden width of the
    wider model (at least 8192, at least 3584, less), which tells these sizes apart in the Llama and Qwen
    families."""
    teacher_size: Rate | None = None
    """The teacher's parameters in billions, for ``mlp_ratio: auto``; null: told by the hidden width."""
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
    """Computed from calibration batches before the first step, keys and values apart, then frozen.

    ``procrustes`` and ``ridge`` map onto the other side's cache as it is before training: they are for a
    pretrained student. With one that starts from random weights there is only noise to fit.
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
