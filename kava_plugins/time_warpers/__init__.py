"""Built-in time warpers: ``t_time → time``, plus which student positions are valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig, Strict

SegmentName = Literal["prompt", "reasoning", "answer"]
Share = Annotated[float, Field(gt=0, le=1)]


def _odd(window: int) -> int:
    if window % 2 == 0:
        raise ValueError(f"must be odd, such as {window + 1}")
    return window


Window = Annotated[int, Field(ge=1), AfterValidator(_odd)]


class Identity(ComponentConfig):
    """Position i reads position i; both sides must be equally long."""

    name: Literal["identity"] = "identity"
    component = "kava_plugins.time_warpers.identity:Identity"


class Pad(ComponentConfig):
    """The k-th token reads the k-th token; the longer side is cut, the rest is not compared."""

    name: Literal["pad"] = "pad"
    component = "kava_plugins.time_warpers.pad:Pad"


class Linear(ComponentConfig):
    """The whole sequence stretched or shrunk to the student's length, example by example."""

    name: Literal["linear"] = "linear"
    component = "kava_plugins.time_warpers.linear:Linear"

    mode: Literal["interpolate", "nearest"] = "interpolate"
    """Between two teacher positions: their weighted mean, or the nearer one."""


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


class Segment(ComponentConfig):
    """Prompt, reasoning and answer resampled apart from one another, with every example's own borders."""

    name: Literal["segment"] = "segment"
    component = "kava_plugins.time_warpers.segment:Segment"

    segments: tuple[SegmentName, ...] = Field(("prompt", "reasoning", "answer"), min_length=1)
    """Segments that are compared; positions of the others are not valid."""
    ratio: Ratios = Ratios()
    """Of a segment's ``n`` student positions only ``round(ratio · n)``, evenly spaced, are compared."""
    smoothing: Windows = Windows()
    """Window of a moving average over the teacher's segment before it is resampled."""
    mode: Literal["interpolate", "nearest"] = "interpolate"
    """Between two teacher positions: their weighted mean, or the nearer one."""


@hookimpl
def kava_time_warpers() -> Sequence[type[ComponentConfig]]:
    """Register this package's time warpers."""
    return [Identity, Pad, Linear, Segment]
