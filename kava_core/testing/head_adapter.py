"""Test head adapters: ``t_head → head``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from kava_core.config import Part
from kava_core.testing.cache_map import AXES, BATCH, TIME, CacheMapTests
from kava_core.testing.geometries import EXTENTS, Sides
from kava_core.testing.require import require, require_tensor
from kava_core.testing.tensors import draw_part


class HeadAdapterTests(CacheMapTests):
    """The contract of ``kava_core.protocols.head_adapter.HeadAdapter``."""

    kind: ClassVar[str] = "head_adapter"

    def fitted(self, config: Any, sides: Sides) -> Sides:
        """Align layers, which come before heads."""
        return Sides(sides.teacher.with_(layer=sides.student.layer), sides.student)

    def shape_of(self, component: Any, config: Any, sides: Sides, part: Part) -> tuple[int, int, int]:
        """Return the extents of the ``teacher_view``."""
        view = component.teacher_view
        return view.layer, view.heads(part), view.dim

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return the mapped parts, and what ``fold`` makes of tensors like them."""
        return [*super().outputs(component, inputs), *map(component.fold, inputs.values())]

    def test_views_agree(self, config: Any, sides: Sides) -> None:
        """Check that both sides have the same layers and heads after the adapter, to be compared."""
        component = self.build(config, sides)
        teacher, student = component.teacher_view, component.student_view
        contract = "teacher_view and student_view must have equal layers and heads"
        extents = (teacher.layer, teacher.head, teacher.qhead)
        require(extents == (student.layer, student.head, student.qhead), contract, f"{teacher}; {student}")

    def test_fold_gives_the_students_view(self, config: Any, sides: Sides) -> None:
        """Check that ``fold`` brings the student's tensors into ``student_view``."""
        component = self.build(config, sides)
        view = component.student_view
        for part in self.compared(sides):
            for batch, time in EXTENTS:
                x = draw_part(sides.student, part, batch=batch, time=time)
                shape = (batch, view.layer, view.heads(part), time, view.dim)
                require_tensor(component.fold(x), shape, AXES, f"fold ({part})")

    def test_fold_is_attached(self, config: Any, sides: Sides) -> None:
        """Check that the student learns through ``fold``."""
        component = self.build(config, sides)
        for part in self.compared(sides):
            x = draw_part(sides.student, part, batch=BATCH, time=TIME).requires_grad_()
            folded = component.fold(x)
            require(folded.requires_grad, "fold must keep the student's tensor attached", "it is detached")
            folded.sum().backward()
            reached = x.grad is not None and bool((x.grad != 0).all())
            require(reached, "fold must keep every number of the student", "some get no gradient")
