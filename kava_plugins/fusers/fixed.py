"""Constant weights, written in the spec."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.kv.axes import Geometry
from kava_core.protocols import FusionContext
from kava_plugins.fusers import Fixed as Config


class Fixed(nn.Module):
    """The same weights everywhere; equal ones where the spec gives none."""

    weights: Float[Tensor, " teacher"]

    def __init__(self, config: Config, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        given = dict.fromkeys(teachers, 1.0) if config.weights is None else dict(config.weights)
        _check_names(given, teachers)
        weights = torch.tensor([given[name] for name in teachers], dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """The constants, expanded without a copy."""
        teacher, batch, time = context.valid.shape
        layer = context.student.any.shape[1]
        return self.weights[:, None, None, None].expand(teacher, batch, layer, time)


def _check_names(given: dict[str, float], teachers: tuple[str, ...]) -> None:
    for name in given:
        if name not in teachers:
            hint = did_you_mean(name, teachers)
            raise SpecError(f"fuser fixed: weights: no teacher {name!r}; possible: {one_of(teachers)}{hint}")
    missing = set(teachers) - set(given)
    if missing:
        raise SpecError(f"fuser fixed: weights: none for {one_of(missing)}; every teacher needs one")
