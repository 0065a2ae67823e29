"""Built-in time warpers: ``t_time → time``, plus which student positions are valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig, Strict

SegmentName = Literal["prompt", "reasoning", "answer"]
ResampleMode = Literal["auto", "interpolate", "area", "nearest"]
Share = Annotated[float, Field(gt=0, le=1)]


def _odd(window: int) -> int:
    if window % 2 == 0:
        raise ValueError(f"must be odd, such as {window + 1}")
    return window


Window = Annotated[int, Field(ge=1), AfterValidator(_odd)]


class IdentityConfig(ComponentConfig):
    """Position i reads position i; both sides must be equally long."""

    name: Literal["identity"] = "identity"
    component = "kava_plugins.time_warpers.identity:Identity"
    whole_text: ClassVar[bool] = True


class PadConfig(ComponentConfig):
    """The k-th token reads the k-th token; the longer side is cut, the rest is not compared."""

    name: Literal["pad"] = "pad"
    component = "kava_plugins.time_warpers.pad:Pad"
    whole_text: ClassVar[bool] = True


class LinearConfig(ComponentConfig):
    """The whole sequence stretched or shrunk to the student's length, example by example."""

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
    """Prompt, reasoning and answer resampled apart from one another, with every example's own borders."""

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
    """A student token reads the teacher tokens that hold the same characters, across any two tokenizers.

    For one text in two tokenizations. Weights are the intersection over union (IoU) of the character spans,
    normalised; tokens without text (special ones) and tokens whose text the teacher lacks are not valid.
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
    """Only the first few tokens and the most recent ones are compared (StreamingLLM, arXiv 2309.17453).

    The first read the teacher's token of the same index, the recent ones that of the same index counted from
    the end.
    """

    name: Literal["streaming"] = "streaming"
    component = "kava_plugins.time_warpers.streaming:Streaming"
    whole_text: ClassVar[bool] = True

    sinks: int = Field(4, ge=0)
    """Attention sinks: tokens kept at the beginning."""
    window: int = Field(512, ge=1)
    """Tokens kept at the end."""


class RkvConfig(ComponentConfig):
    """Each layer and KV head keeps the reasoning tokens that the answer looks at and that differ from others.

    For latent tokens: as many are kept as there are, in time order (R-KV, arXiv 2505.24133, as KaVa has it,
    arXiv 2510.02312). Heads and layers keep other tokens, so no layer mapper may mix layers.
    """

    name: Literal["rkv"] = "rkv"
    component = "kava_plugins.time_warpers.rkv:Rkv"
    latent_only: ClassVar[bool] = True

    weight: float = Field(0.1, ge=0, le=1)
    """λ: a token's score is λ · importance + (1 − λ) · the share of keys unlike its own."""


class RandomConfig(ComponentConfig):
    """Each layer and KV head keeps reasoning tokens drawn anew in every step: the control of ``rkv``.

    For latent tokens: as many are kept as there are, without replacement, in time order.
    """

    name: Literal["random"] = "random"
    component = "kava_plugins.time_warpers.random:Random"
    latent_only: ClassVar[bool] = True


class UniformConfig(ComponentConfig):
    """Evenly spaced reasoning tokens, the same in all layers and heads; nothing else is compared.

    Of fewer tokens than the student has all are read, one after another; the rest is not valid.
    """

    name: Literal["uniform"] = "uniform"
    component = "kava_plugins.time_warpers.uniform:Uniform"


class CropConfig(ComponentConfig):
    """The first reasoning tokens, as many as the student has; nothing else is compared."""

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
