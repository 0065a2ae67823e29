"""A teacher's way from its positions to the student's: one time warper, or one after another."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from kava_core.errors import PluginError, SpecError
from kava_core.kv.align.boundaries import attribute_errors_to, plan_time
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.align import AlignSpec


class TimePlan(nn.Module):
    """Plans the time map of a batch.

    With a ``token_warper`` the teacher's positions first become the student's; the ``time_warper`` then works
    between the student's positions and themselves, and both are one map.

    Args:
        spec: the alignment.
        name: the teacher's name, for error notes.
        teacher: the teacher's geometry.
        student: the student's geometry.

    Raises:
        PluginError: a warper has parameters that want to be trained.
        SpecError: a token warper stands before one that evicts, or is one itself.
    """

    def __init__(self, spec: AlignSpec, *, name: str, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self._configs = {"token_warper": spec.token_warper, "time_warper": spec.time_warper}
        self._name = name
        for field, config in self._configs.items():
            with self._blame(field):
                built = None if config is None else config.build(teacher=teacher, student=student)
                self.add_module(field, built)
                if built is not None and any(p.requires_grad for p in built.parameters()):
                    raise PluginError("has trained parameters, but time maps pass no gradient to them")
        if self.token_warper is not None and any(isinstance(one, Evictor) for one in self.children()):
            raise SpecError(
                f"teacher {name!r}: a time warper that evicts chooses among the teacher's own tokens, and "
                "cannot go together with a token_warper"
            )

    @property
    def evictor(self) -> Evictor | None:
        """The time warper, if it evicts: the map is then from its slots."""
        return self.time_warper if isinstance(self.time_warper, Evictor) else None

    def _blame(self, field: str) -> AbstractContextManager[None]:
        config = self._configs[field]
        who = "" if config is None else f"{field} {config.name!r}, teacher {self._name!r}"
        return attribute_errors_to(who, config)

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map of a batch, for timelines on one device."""
        if self.token_warper is None:
            return self._planned("time_warper", teacher, student)
        tokens = self._planned("token_warper", teacher, student)
        return tokens.then(self._planned("time_warper", student, student))

    def _planned(self, field: str, teacher: Timeline, student: Timeline) -> TimeMap:
        with self._blame(field):
            return plan_time(getattr(self, field), teacher, student)
