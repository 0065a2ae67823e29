"""Built-in losses between the student's cache and the aligned target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kava_core import hookimpl
from kava_core.config import KVLossConfig, Part

Scale = Literal["none", "batch", "example"]
Divergence = Literal["forward", "reverse", "jeffreys"]


class MSEConfig(KVLossConfig):
    """Mean squared difference over heads and width (KaVa with p = 2, arXiv 2510.02312)."""

    name: Literal["mse"] = "mse"
    component = "kava_plugins.kv_losses.mse:MSE"

    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class SmoothL1Config(KVLossConfig):
    """Mean absolute difference, quadratic near zero (KaVa with p = 1, arXiv 2510.02312)."""

    name: Literal["smooth_l1"] = "smooth_l1"
    component = "kava_plugins.kv_losses.smooth_l1:SmoothL1"

    beta: float = Field(1.0, gt=0)
    """Differences below this are squared."""
    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class MercatorConfig(KVLossConfig):
    """1 − cosine over the width of a head: directions count, lengths do not."""

    name: Literal["mercator"] = "mercator"
    component = "kava_plugins.kv_losses.mercator:Mercator"


class RelationConfig(KVLossConfig):
    """Difference of the relations between positions: cosines or softmaxed products, heads merged or re-split.

    Neither head counts nor bases need agree. Relations between positions: MiniLMv2 (arXiv 2012.15828).
    """

    name: Literal["relation"] = "relation"
    component = "kava_plugins.kv_losses.relation:Relation"
    basis_free: ClassVar[bool] = True

    parts: tuple[Part, ...] = Field(("values",), min_length=1)
    """Which tensors are compared. Values alone were faster than keys and values in our runs."""
    center: bool = True
    """Remove each example's mean over time first. MiniLMv2 does not."""
    form: Literal["cosine", "softmax"] = "cosine"
    """``cosine``: mean squared difference of cosines; ``softmax``: KL divergence of the rows of
    softmax(x·xᵀ / √width), the target's first (MiniLMv2)."""
    heads: Annotated[int, Field(ge=1)] | Literal["merged"] = "merged"
    """Relation heads: all heads side by side as one, or cut anew into so many of equal width. The number must
    divide the full width (heads × width) of both sides."""


class SharedSpaceConfig(KVLossConfig):
    """Distance in a space both caches are mapped to by canonical correlations (Hotelling 1936), measured
    before training: for models that share neither widths nor architecture (an encoder's cache, say).

    All heads of a layer stand side by side, so neither head counts nor widths need agree, and
    ``dim_projector: identity`` is enough. Directions count by how the two correlate in them, on examples that
    they were not computed from. Maps that can be undone change nothing before it, so the control
    ``random_alignment`` is none here.
    """

    name: Literal["shared_space"] = "shared_space"
    component = "kava_plugins.kv_losses.shared_space:SharedSpace"
    basis_free: ClassVar[bool] = True

    parts: tuple[Part, ...] = Field(("values",), min_length=1)
    """Which tensors are compared."""
    dim: int = Field(32, ge=1)
    """Directions of the space, at most as many as the narrower side has (heads × width)."""
    ridge: float = Field(1e-2, gt=0)
    """Added to each side's covariance, as a multiple of its mean variance: few examples show correlations
    that are none."""
    trainable: bool = False
    """Train the directions of both sides, which begin at the canonical ones. They stay orthonormal in the
    whitened caches, so the loss cannot be lowered by shrinking the space, but it can by turning to what
    agrees already."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak rate of the directions; null: ``train.learning_rate``."""


class AttentionKLConfig(KVLossConfig):
    """KL divergence of attention rows, without attention maps: memory is linear in time.

    Rows are made of the compared queries and keys, so ``rotary: match`` (or ``keep``) compares what the
    models attend to, and ``strip`` only what they look for by content. Widths may differ, query heads may
    not.
    Attention rows as a target: MiniLM (arXiv 2002.10957).
    """

    name: Literal["attention_kl"] = "attention_kl"
    component = "kava_plugins.kv_losses.attention_kl:AttentionKL"
    basis_free: ClassVar[bool] = True

    parts: tuple[Literal["keys"], Literal["queries"]] = ("keys", "queries")
    """Attention rows need both, and nothing else."""
    temperature: float = Field(1.0, gt=0)
    """Products are divided by this on both sides; the loss is not multiplied by its square."""
    kind: Divergence = "forward"
    """``forward``: KL(target ‖ student); ``reverse``: KL(student ‖ target); ``jeffreys``: their sum."""
    causal: bool = True
    """A position attends to itself and to earlier ones only."""


class AttentionOutputConfig(KVLossConfig):
    """Difference of softmax(q·k)·v: what the student's and the target's attention hand on."""

    name: Literal["attention_output"] = "attention_output"
    component = "kava_plugins.kv_losses.attention_output:AttentionOutput"

    parts: tuple[Literal["keys"], Literal["values"], Literal["queries"]] = ("keys", "values", "queries")
    """Attention outputs need all three."""
    form: Literal["cosine", "mse"] = "cosine"
    """``cosine``: 1 − cosine over the width of a query head; ``mse``: mean squared difference."""
    temperature: float = Field(1.0, gt=0)
    """Products of queries and keys are divided by this on both sides."""
    causal: bool = True
    """A position attends to itself and to earlier ones only."""


class StructuralConfig(KVLossConfig):
    """alpha_k · (1 − cos K) + alpha_v · (1 − cos V) + alpha_attn · KL(attention).

    Queries are captured only if alpha_attn is above 0. See ``mercator`` and ``attention_kl``.
    """

    name: Literal["structural"] = "structural"
    component = "kava_plugins.kv_losses.structural:Structural"

    parts: tuple[Part, ...] = ()
    """Leave it out: the alphas say which tensors are read."""
    alpha_k: float = Field(1.0, ge=0)
    """Weight of 1 − cosine of keys."""
    alpha_v: float = Field(1.0, ge=0)
    """Weight of 1 − cosine of values."""
    alpha_attn: float = Field(0.1, ge=0)
    """Weight of the divergence of attention rows."""
    attention_layers: Annotated[tuple[int, ...], Field(min_length=1)] | Literal["all"] = "all"
    """Where attention is compared, counted from 0 among the layers the loss looks at (negative: from the
    last). Their mean stands for all layers, so alpha_attn need not change with their number."""
    temperature: float = Field(1.0, gt=0)
    """Products of queries and keys are divided by this on both sides."""
    kind: Divergence = "forward"
    """``forward``: KL(target ‖ student); ``reverse``: KL(student ‖ target); ``jeffreys``: their sum."""
    causal: bool = True
    """A position attends to itself and to earlier ones only."""

    @model_validator(mode="after")
    def _parts_follow(self) -> StructuralConfig:
        parts = self._wanted()
        if not parts:
            raise ValueError("alpha_k, alpha_v and alpha_attn are all 0: nothing is compared")
        if self.parts and self.parts != parts:
            raise ValueError(f"these alphas compare {', '.join(parts)}: leave 'parts' out")
        self.__dict__["parts"] = parts  # frozen against others
        return self

    def _wanted(self) -> tuple[Part, ...]:
        reads: dict[Part, float] = {
            "keys": self.alpha_k + self.alpha_attn,
            "values": self.alpha_v,
            "queries": self.alpha_attn,
        }
        return tuple(part for part, alpha in reads.items() if alpha > 0)


@hookimpl
def kava_kv_losses() -> Sequence[type[KVLossConfig]]:
    """Register this package's losses."""
    return [
        MSEConfig,
        SmoothL1Config,
        MercatorConfig,
        RelationConfig,
        SharedSpaceConfig,
        AttentionKLConfig,
        AttentionOutputConfig,
        StructuralConfig,
    ]
