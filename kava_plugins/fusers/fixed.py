"""Weigh teachers by constants that the spec names."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.errors import SpecError, did_you_mean, one_of
from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import FixedConfig


class Fixed(nn.Module):
    """The same weights everywhere; equal ones if the spec gives none. A teacher of weight 0 does not run.

    With ``sample`` only some teachers count in a forward pass of training, and only they run.
    """

    needs_targets = False
    weights: Float[Tensor, " teacher"]
    chosen: Bool[Tensor, " teacher"]

    def __init__(self, config: FixedConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.sample, self.draws = config.sample, config.sample is not None
        weights = constant_weights(config.weights, teachers, who="fixed")
        if config.sample is not None:
            candidates = int((weights > 0).sum())
            if config.sample > candidates:
                raise SpecError(
                    f"fuser fixed: sample: {config.sample} of {candidates} teachers with a weight above 0"
                )
        with torch.device("cpu"):
            self._constants = constant_weights(config.weights, teachers, who="fixed")
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("chosen", weights > 0, persistent=False)

    @torch.no_grad()
    def choose(self) -> Bool[Tensor, " teacher"]:
        """Choose the teachers that are to run: all, or a sample without replacement, drawn by weight.

        The answer is on the CPU, where the decision is needed.
        """
        chosen = self._constants > 0
        if self.training and self.sample is not None:
            drawn = torch.multinomial(self._constants, self.sample)
            chosen = torch.zeros_like(chosen).index_fill_(0, drawn, True)
        self.chosen.copy_(chosen, non_blocking=True)
        return chosen

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return the constants, 0 for teachers that were not chosen, expanded without a copy."""
        teacher, batch, time = context.valid.shape
        layer = context.student.any.shape[1]
        return (self.weights * self.chosen)[:, None, None, None].expand(teacher, batch, layer, time)


def constant_weights(
    weights: dict[str, float] | None, teachers: tuple[str, ...], *, who: str
) -> Float[Tensor, " teacher"]:
    """Return the weights in the teachers' order, 1 each if none are given.

    Raises:
        SpecError: a name is no teacher's, or a teacher has no weight.
    """
    given = dict.fromkeys(teachers, 1.0) if weights is None else dict(weights)
    _check_names(given, teachers, who)
    return torch.tensor([given[name] for name in teachers], dtype=torch.float32)


def _check_names(given: dict[str, float], teachers: tuple[str, ...], who: str) -> None:
    for name in given:
        if name not in teachers:
            hint = did_you_mean(name, teachers)
            raise SpecError(f"fuser {who}: weights: no teacher {name!r}; possible: {one_of(teachers)}{hint}")
    missing = set(teachers) - set(given)
    if missing:
        raise SpecError(f"fuser {who}: weights: none for {one_of(missing)}; every teacher needs one")
