"""Describe how one teacher's cache is brought to the student's axes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kava_core.config import ComponentConfig, Strict


class AlignSpec(Strict):
    """How one teacher's cache is brought to the student's axes, one component for each axis.

    A component is written as its name, ``layer_mapper: cka``, or as a mapping with its name and parameters,
    ``layer_mapper: {name: ratio, sources: 2}``.
    """

    layer_mapper: ComponentConfig = Field(default={"name": "ratio"})  # type: ignore[assignment]
    """Chooses the teacher layers for each student layer: t_layer → layer. Example: ``cka``."""
    layers: Literal["mean", "concat"] = "mean"
    """What happens if a student layer reads several teacher layers. ``mean``: their mean with the mapper's
    weights; ``concat``: they are put side by side along the width, and the projector chooses from them."""
    head_adapter: ComponentConfig = Field(default={"name": "structured"})  # type: ignore[assignment]
    """Brings the teacher's KV heads to the student's: t_head → head. Example: ``flat``."""
    token_warper: ComponentConfig | None = None
    """A time warper that first brings the teacher's tokens to the student's, for models with different
    tokenizers; ``time_warper`` then works among the student's positions. Both are applied as one map.
    Example: ``char_iou``."""
    time_warper: ComponentConfig = Field(default={"name": "segment"})  # type: ignore[assignment]
    """Brings the teacher's positions to the student's: t_time → time. Example:
    ``{name: segment, ratio: {reasoning: 0.5}}``."""
    sinks: Literal["leave_out", "leave_out_first", "compare"] = "leave_out"
    """What happens to attention sinks, on which attention rests whatever their tokens say, and whose values
    are tiny. ``leave_out``: the first token of a text, and later positions whose values are shorter than 0.4
    of the usual length by the mean over layers, have no target, on either side: they count neither in
    calibration nor in losses; ``leave_out_first``: the first token alone has none; ``compare``: all count
    like any other. Latent tokens are compared either way."""
    dim_projector: ComponentConfig = Field(default={"name": "calibrated"})  # type: ignore[assignment]
    """Brings the teacher's head width to the student's: t_dim → dim. Example: ``linear``."""
    direction: Literal["to_student", "to_teacher"] = "to_student"
    """Which side the head adapter and the projector map. ``to_student``: the teacher's cache, to the
    student's heads and width; ``to_teacher``: the student's cache, up to the teacher's, which stays as it is
    (FitNets, arXiv 1412.6550)."""
