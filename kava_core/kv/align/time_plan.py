"""Plan how a teacher's positions become the student's: one time warper, or one after another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

from torch import nn

from kava_core.config import ComponentConfig
from kava_core.errors import PluginError, SpecError
from kava_core.kv.align.boundaries import attribute_errors_to, build_component, plan_time
from kava_core.kv.maths.sinks import is_first_token, leave_out
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import Timeline

Sinks = Literal["leave_out", "leave_out_first", "compare"]
"""What a spec does with attention sinks."""
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
        sinks: what has no target. ``leave_out``: first tokens, and attention sinks found in captured values;
            ``leave_out_first``: first tokens; ``compare``: nothing.

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
        sinks: Sinks = "compare",
    ) -> None:
        super().__init__()
        self.sinks = sinks
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
        if self.sinks == "compare" or self.evictor is not None:  # an evictor keeps reasoning tokens alone
            return time_map
        return leave_out(time_map, is_first_token(teacher), is_first_token(student))

    @property
    def finds_sinks(self) -> bool:
        """Return whether attention sinks behind the first token are looked for in captured values."""
        return self.sinks == "leave_out" and self.evictor is None

    def _plan(self, teacher: Timeline, student: Timeline) -> TimeMap:
        if self.token_warper is None:
            return self._plan_with("time_warper", teacher, student)
        tokens_to_tokens = self._plan_with("token_warper", teacher, student)
        return tokens_to_tokens.then(self._plan_with("time_warper", student, student))

    def _plan_with(self, field: WarperField, teacher: Timeline, student: Timeline) -> TimeMap:
        with self._errors_of(field):
            return plan_time(getattr(self, field), teacher, student)
