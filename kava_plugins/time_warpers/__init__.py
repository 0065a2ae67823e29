"""Declare the built-in time warpers: ``t_time → time``, plus which student positions are valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig, Strict

SegmentName = Literal["prompt", "reasoning", "answer"]
ResampleMode = Literal["auto", "interpolate", "area", "nearest"]
Share = Annotated[float, Field(gt=0, le=1)]


def _check_odd(window: int) -> int:
    if window % 2 == 0:
        raise ValueError(f"must be odd, such as {window + 1}")
    return window


Window = Annotated[int, Field(ge=1), AfterValidator(_check_odd)]


class IdentityConfig(ComponentConfig):
    """Let position i read position i; both sides must be equally long.

    Formula: ``M[time, t_time] = 1`` where ``t_time = time``, else 0.

    Source: kava's own.
    """

    name: Literal["identity"] = "identity"
    component = "kava_plugins.time_warpers.identity:Identity"
    whole_text: ClassVar[bool] = True


class PadConfig(ComponentConfig):
    """Let the k-th token read the k-th token; the longer side is cut, the rest is not compared.

    Formula: student token k reads teacher token k, both counted from the first real token.

    Source: kava's own.
    """

    name: Literal["pad"] = "pad"
    component = "kava_plugins.time_warpers.pad:Pad"
    whole_text: ClassVar[bool] = True


class LinearConfig(ComponentConfig):
    """Stretch or shrink the whole sequence to the student's length, example by example.

    Formula: student token i of n reads the place ``(i + ½) · m / n − ½`` among the teacher's m tokens.

    Source: kava's own; the places are those of torch's ``F.interpolate`` with ``align_corners=False``.
    """

    name: Literal["linear"] = "linear"
    component = "kava_plugins.time_warpers.linear:Linear"
    whole_text: ClassVar[bool] = True

    mode: ResampleMode = "auto"
    """``interpolate``: the weighted mean of the two nearest teacher positions; ``area``: of all that are
    covered; ``nearest``: one; ``auto``: ``area`` where there are more than twice as many, else
    ``interpolate``."""


class Ratios(Strict):
    """For each segment, the share of the student's positions that are compared."""

    prompt: Share = 1.0
    """Share of the prompt."""
    reasoning: Share = 1.0
    """Share of the written steps."""
    answer: Share = 1.0
    """Share of the answer."""


class Windows(Strict):
    """For each segment, an odd number of teacher positions; 1: no smoothing."""

    prompt: Window = 1
    """Window in the prompt."""
    reasoning: Window = 1
    """Window in the written steps."""
    answer: Window = 1
    """Window in the answer."""


class SegmentConfig(ComponentConfig):
    """Resample prompt, reasoning and answer apart from one another, by every example's own borders.

    Formula: token i of a segment of n reads the place ``(i + ½) · m / n − ½`` among the m tokens of the
    teacher's same segment.

    Source: kava's own.
    """

    name: Literal["segment"] = "segment"
    component = "kava_plugins.time_warpers.segment:Segment"

    segments: tuple[SegmentName, ...] = Field(("prompt", "reasoning", "answer"), min_length=1)
    """Segments that are compared; positions of the others are not valid."""
    ratio: Ratios = Ratios()
    """Of a segment's ``n`` student positions only ``round(ratio · n)``, evenly spaced, are compared."""
    smoothing: Windows = Windows()
    """Window of a moving average over the teacher's segment before it is resampled."""
    mode: ResampleMode = "auto"
    """``interpolate``: the weighted mean of the two nearest teacher positions; ``area``: of all that are
    covered; ``nearest``: one; ``auto``: ``area`` where there are more than twice as many, else
    ``interpolate``."""


class CharIoUConfig(ComponentConfig):
    """Let a token read the teacher tokens that hold the same characters, across any two tokenizers.

    Formula: ``J[time, t_time] = |S ∩ T| / |S ∪ T|`` of the two tokens' character spans S and T, and
    ``M[time, t_time] = J[time, t_time] / Σ_t_time J[time, t_time]``.

    For one text in two tokenizations. Tokens without text (special ones) and tokens whose text the teacher
    lacks are not valid.

    Source: kava's own; the intersection over union (IoU) of two spans is their Jaccard index.
    """

    name: Literal["char_iou"] = "char_iou"
    component = "kava_plugins.time_warpers.char_iou:CharIoU"
    same_text: ClassVar[bool] = True
    whole_text: ClassVar[bool] = True

    mode: Literal["soft", "hard"] = "soft"
    """Read every overlapping teacher token by its IoU, or only the one with the highest, the first of
    equals."""
    min_overlap: float = Field(0.0, ge=0, le=1)
    """Pairs of a lower IoU are left out."""


class StreamingConfig(ComponentConfig):
    """Compare only the first few tokens and the most recent ones.

    Formula: of n student and m teacher tokens, token i reads i if ``i < sinks``, else ``m − n + i`` if
    ``i ≥ n − window``; the others are not valid.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    name: Literal["streaming"] = "streaming"
    component = "kava_plugins.time_warpers.streaming:Streaming"
    whole_text: ClassVar[bool] = True

    sinks: int = Field(4, ge=0)
    """Attention sinks: tokens kept at the beginning."""
    window: int = Field(512, ge=1)
    """Tokens kept at the end."""


class RkvConfig(ComponentConfig):
    """Keep the reasoning tokens that the answer looks at and that differ from others, for each KV head.

    Formula: ``score = weight · I + (1 − weight) · R``, both over the reasoning tokens, with
    ``I = max over the query heads of a KV head of (mean over answer tokens of softmax(q · k / √dim))`` and
    ``R = softmax(−mean cosine of the token's key to the other keys)``.

    For latent tokens: as many are kept as there are, in time order. Heads and layers keep other tokens, so no
    layer mapper may mix layers.

    Source: R-KV, arXiv 2505.24133, as KaVa has it, arXiv 2510.02312.
    """

    name: Literal["rkv"] = "rkv"
    component = "kava_plugins.time_warpers.rkv:Rkv"
    latent_only: ClassVar[bool] = True

    weight: float = Field(0.1, ge=0, le=1)
    """Weight of the importance I in a token's score; that of R is ``1 − weight``."""


class RandomConfig(ComponentConfig):
    """Keep reasoning tokens drawn anew in every step, for each layer and KV head: the control of ``rkv``.

    Formula: all sets of as many reasoning tokens as the student has latent tokens are equally likely.

    For latent tokens: tokens are drawn without replacement and kept in time order.

    Source: kava's own.
    """

    name: Literal["random"] = "random"
    component = "kava_plugins.time_warpers.random:Random"
    latent_only: ClassVar[bool] = True


class UniformConfig(ComponentConfig):
    """Keep evenly spaced reasoning tokens, the same in all layers and heads; nothing else is compared.

    Formula: reasoning token k of M reads the teacher's reasoning token ``⌊(k + ½) · n / M⌋`` of n, from 0.

    If the teacher has fewer tokens than the student, all are read, one after another; the rest is not valid.

    Source: kava's own.
    """

    name: Literal["uniform"] = "uniform"
    component = "kava_plugins.time_warpers.uniform:Uniform"


class CropConfig(ComponentConfig):
    """Keep the first reasoning tokens, as many as the student has; nothing else is compared.

    Formula: reasoning token k reads the teacher's reasoning token k.

    Source: kava's own.
    """

    name: Literal["crop"] = "crop"
    component = "kava_plugins.time_warpers.crop:Crop"


@hookimpl
def kava_time_warpers() -> Sequence[type[ComponentConfig]]:
    """Register this package's time warpers."""
    return [
        IdentityConfig,
        PadConfig,
        LinearConfig,
        SegmentConfig,
        CharIoUConfig,
        StreamingConfig,
        RkvConfig,
        RandomConfig,
        UniformConfig,
        CropConfig,
    ]
