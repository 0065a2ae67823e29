"""Plan how a teacher's positions become the student's: one time warper, or one after another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from kava_core.config import ComponentConfig
from kava_core.errors import PluginError, SpecError
from kava_core.kv.align.boundaries import attribute_errors_to, build_component, plan_time
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import PROMPT, Timeline

WarperField = Literal["token_warper", "time_warper"]
"""The two places of a spec's ``align`` section that hold a time warper."""


class TimePlan(nn.Module):
    """Plans the time map of a batch.

    With a ``token_warper`` the teacher's positions first become the student's; the ``time_warper`` then works
    between the student's positions and themselves, and both are one map.

    Args:
        warpers: the declaration of each warper, by its place in the spec; None if there is none.
        name: the teacher's name, for error notes.
        teacher: the teacher's geometry.
        student: the student's geometry.
        compares_first_token: whether the first token of a text is compared like any other.

    Raises:
        PluginError: a warper has parameters that want to be trained.
        SpecError: a token warper is given beside one that evicts, or is one itself.
    """

    def __init__(
        self,
        warpers: Mapping[WarperField, ComponentConfig | None],
        *,
        name: str,
        teacher: Geometry,
        student: Geometry,
        compares_first_token: bool = True,
    ) -> None:
        super().__init__()
        self.compares_first_token = compares_first_token
        self._configs = dict(warpers)
        self._name = name
        for field in ("token_warper", "time_warper"):
            self.add_module(field, self._build_warper(field, teacher, student))
        if self.token_warper is not None and any(isinstance(warper, Evictor) for warper in self.children()):
            raise SpecError(
                f"teacher {name!r}: a time warper that evicts chooses among the teacher's own tokens, and "
                "cannot go together with a token_warper"
            )

    def _build_warper(self, field: WarperField, teacher: Geometry, student: Geometry) -> nn.Module | None:
        config = self._configs.get(field)
        if config is None:
            return None
        with self._errors_of(field):
            warper: nn.Module = build_component(config, teacher=teacher, student=student)
            if any(parameter.requires_grad for parameter in warper.parameters()):
                # Time maps are planned beside the batches, in processes that have no gradients.
                raise PluginError("has trained parameters, but time maps pass no gradient to them")
        return warper

    @property
    def evictor(self) -> Evictor | None:
        """Return the time warper if it evicts tokens, else None; the map then starts from its slots."""
        return self.time_warper if isinstance(self.time_warper, Evictor) else None

    def _errors_of(self, field: WarperField) -> AbstractContextManager[None]:
        config = self._configs[field]
        assert config is not None
        return attribute_errors_to(f"{field} {config.name!r}, teacher {self._name!r}", config)

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Return the map of a batch, for timelines on one device."""
        time_map = self._plan(teacher, student)
        if self.compares_first_token or self.evictor is not None:  # an evictor keeps reasoning tokens alone
            return time_map
        return without_first_tokens(time_map, teacher, student)

    def _plan(self, teacher: Timeline, student: Timeline) -> TimeMap:
        if self.token_warper is None:
            return self._plan_with("time_warper", teacher, student)
        tokens_to_tokens = self._plan_with("token_warper", teacher, student)
        return tokens_to_tokens.then(self._plan_with("time_warper", student, student))

    def _plan_with(self, field: WarperField, teacher: Timeline, student: Timeline) -> TimeMap:
        with self._errors_of(field):
            return plan_time(getattr(self, field), teacher, student)


def without_first_tokens(time_map: TimeMap, teacher: Timeline, student: Timeline) -> TimeMap:
    """Return the map without the student's first token, and without positions that read the teacher's.

    The first token of a text is an attention sink: massive keys and tiny values, of every model's own kind. A
    latent token is no such token, even if it is the first that is compared.

    Source: Xiao et al. 2023, arXiv 2309.17453 (attention sinks); Sun et al. 2024, arXiv 2402.17762 (massive
    activations).
    """
    valid = time_map.valid & ~is_first_token(student)
    example = time_map.rows // max(valid.shape[1], 1)
    t_time = teacher.mask.shape[1]
    reads_first = is_first_token(teacher).flatten()[example * t_time + time_map.index] & (time_map.weight > 0)
    count = torch.zeros(valid.numel(), dtype=torch.long, device=valid.device)
    count = count.index_add_(0, time_map.rows, reads_first.long())
    return replace(time_map, valid=valid & (count == 0).view(valid.shape))


def is_first_token(timeline: Timeline) -> Bool[Tensor, "batch time"]:
    """Return whether each position is the first token of a text, which is one of the prompt."""
    return timeline.mask & (timeline.positions == 0) & (timeline.segments == PROMPT)
