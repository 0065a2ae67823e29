"""Describe how one teacher's cache is brought to the student's axes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kava_core.config import ComponentConfig, Strict


class AlignSpec(Strict):
    """How one teacher's cache is brought to the student's axes. Each field is a component's name, or a
    mapping with its name and parameters."""

    layer_mapper: ComponentConfig = Field(default={"name": "ratio"})  # type: ignore[assignment]
    """t_layer → layer."""
    layers: Literal["mean", "concat"] = "mean"
    """Where a student layer reads several teacher layers: their mean with the mapper's weights, or side by
    side along the width, for the projector to choose from."""
    head_adapter: ComponentConfig = Field(default={"name": "structured"})  # type: ignore[assignment]
    """t_head → head."""
    token_warper: ComponentConfig | None = None
    """A time warper that first brings the teacher's tokens to the student's (say, char_iou); time_warper then
    works among the student's positions. Both are applied as one map."""
    time_warper: ComponentConfig = Field(default={"name": "segment"})  # type: ignore[assignment]
    """t_time → time."""
    dim_projector: ComponentConfig = Field(default={"name": "calibrated"})  # type: ignore[assignment]
    """t_dim → dim."""
    direction: Literal["to_student", "to_teacher"] = "to_student"
    """Which side the head adapter and the projector map: the teacher's cache to the student's heads and
    width, or the student's cache up to the teacher's, which stays as it is (FitNets)."""
