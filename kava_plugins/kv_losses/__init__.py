"""Declare the built-in losses between the student's cache and the aligned target.

Formulas give the loss of one position: s is the student's vector, t the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kava_core import hookimpl
from kava_core.config import KVLossConfig, Part

Scale = Literal["none", "batch", "example"]
Divergence = Literal["forward", "reverse", "jeffreys"]


class MSEConfig(KVLossConfig):
    """Compare by the mean squared difference over heads and width.

    Formula: ``mean over head, dim of (s[head, dim] − t[head, dim])²``.

    Source: KaVa with p = 2, arXiv 2510.02312.
    """

    name: Literal["mse"] = "mse"
    component = "kava_plugins.kv_losses.mse:MSE"

    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class SmoothL1Config(KVLossConfig):
    """Compare by the mean absolute difference over heads and width, quadratic near zero.

    Formula: ``mean over head, dim of (d² / (2 · beta) if |d| < beta, else |d| − beta / 2)``, ``d = s − t``.

    Source: KaVa with p = 1, arXiv 2510.02312; Girshick 2015, arXiv 1504.08083 (smooth L1).
    """

    name: Literal["smooth_l1"] = "smooth_l1"
    component = "kava_plugins.kv_losses.smooth_l1:SmoothL1"

    beta: float = Field(1.0, gt=0)
    """Differences below this are squared."""
    scale: Scale = "none"
    """Divide both sides by the target's detached standard deviation, per layer: over the ``batch``, as KaVa
    does (it then depends on how a batch is divided into forward passes), or over each ``example``."""


class MercatorConfig(KVLossConfig):
    """Compare the directions of a head's vectors; their lengths do not count.

    Formula: ``mean over head of 1 − cos(s[head], t[head])``, the cosine over ``dim``.

    Source: kava's own.
    """

    name: Literal["mercator"] = "mercator"
    component = "kava_plugins.kv_losses.mercator:Mercator"


class RelationConfig(KVLossConfig):
    """Compare the relations between positions: cosines or softmaxed products, heads merged or re-split.

    Formula: ``cosine``: ``mean over the valid positions j of (cos(s[i], s[j]) − cos(t[i], t[j]))²``;
    ``softmax``: ``KL(softmax over j of t[i] · t[j] / √width ‖ softmax over j of s[i] · s[j] / √width)``.

    Neither head counts nor bases need agree.

    Source: MiniLMv2, arXiv 2012.15828 (the softmax form; cosines are kava's own).
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
    """Compare both caches in the space of their canonical correlations, measured before training.

    Formula: ``Σ_k ρ[k] · (a[k] · (s − mean s) − b[k] · (t − mean t))² / Σ_k ρ[k]``; a and b are the canonical
    directions of the two caches, heads merged, and ρ their correlations.

    For models that share neither widths nor architecture, such as an encoder's cache. Neither head counts nor
    widths need agree, so ``dim_projector: identity`` is enough. Directions count by how the two correlate in
    them, on examples that they were not computed from. Maps that can be undone change nothing before it, so
    the control ``random_alignment`` is none here.

    Source: Hotelling 1936 (CCA).
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
    """Compare attention rows by their KL divergence, without attention maps.

    Formula: ``mean over qhead of Σ_j P[j] · log(P[j] / Q[j])``, j over time; P is the target's row
    ``softmax(q · k / (√dim · temperature))``, Q the student's.

    Each side has its model's own scale and soft cap of logits, also after a width projection; attention with
    sinks or position biases is refused. Memory is linear in time. Rows are made of the compared queries and
    keys, so ``rotary: match`` (or ``keep``) compares what the models attend to, and ``strip`` only what they
    look for by content. Widths may differ, query heads may not.

    Source: MiniLM, arXiv 2002.10957.
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
    """Compare the outputs of attention, softmax(q·k)·v, of the student and the target.

    Formula: ``mean over qhead of 1 − cos(o_s, o_t)``, with each side's
    ``o = softmax(q · k / (√dim · temperature)) · v``; with ``form: mse`` the mean squared difference.

    Each side has its model's own scale, also after a width projection; attention with capped logits, sinks or
    position biases is refused.

    Source: kava's own; arXiv 2608.03893 found that attention outputs predict the quality of a mapped cache.
    """

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
    """Compare directions of keys and values and the attention rows they serve, in one sum.

    Formula: ``alpha_k · (1 − cos K) + alpha_v · (1 − cos V) + alpha_attn · KL(attention rows)``.

    The terms are those of ``mercator`` and ``attention_kl``. Queries are captured only if alpha_attn is above
    0.

    Source: kava's own.
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
    last). Their mean counts as that of all layers, so alpha_attn need not change with their number."""
    temperature: float = Field(1.0, gt=0)
    """Products of queries and keys are divided by this on both sides."""
    kind: Divergence = "forward"
    """``forward``: KL(target ‖ student); ``reverse``: KL(student ‖ target); ``jeffreys``: their sum."""
    causal: bool = True
    """A position attends to itself and to earlier ones only."""

    @model_validator(mode="after")
    def _parts_follow(self) -> StructuralConfig:
        parts = self._compared_parts()
        if not parts:
            raise ValueError("alpha_k, alpha_v and alpha_attn are all 0: nothing is compared")
        if self.parts and self.parts != parts:
            raise ValueError(f"these alphas compare {', '.join(parts)}: leave 'parts' out")
        self.__dict__["parts"] = parts  # the model is frozen against others
        return self

    def _compared_parts(self) -> tuple[Part, ...]:
        alpha_of_part: dict[Part, float] = {
            "keys": self.alpha_k + self.alpha_attn,
            "values": self.alpha_v,
            "queries": self.alpha_attn,
        }
        return tuple(part for part, alpha in alpha_of_part.items() if alpha > 0)


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
