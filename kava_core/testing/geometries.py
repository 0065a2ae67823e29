"""List pairs of models that are awkward in one way each."""

from __future__ import annotations

from typing import NamedTuple

from kava_core.protocols.axes import Geometry


class Sides(NamedTuple):
    """A teacher and a student, by their extents."""

    teacher: Geometry
    student: Geometry


def _geometry(layer: int, head: int, dim: int, qhead: int) -> Geometry:
    return Geometry(layer=layer, head=head, dim=dim, qhead=qhead, hidden=max(qhead, head) * dim)


GEOMETRIES: dict[str, Sides] = {
    "usual": Sides(_geometry(4, 4, 8, 8), _geometry(3, 2, 4, 4)),
    "equal": Sides(_geometry(3, 2, 4, 4), _geometry(3, 2, 4, 4)),
    "one_student_layer": Sides(_geometry(5, 4, 8, 4), _geometry(1, 2, 4, 2)),
    "one_teacher_layer": Sides(_geometry(1, 2, 8, 4), _geometry(4, 2, 4, 4)),
    "fewer_teacher_layers": Sides(_geometry(2, 4, 8, 4), _geometry(5, 2, 4, 4)),
    "to_one_head": Sides(_geometry(4, 4, 8, 8), _geometry(2, 1, 8, 4)),
    "from_one_head": Sides(_geometry(4, 1, 8, 8), _geometry(2, 4, 8, 4)),
    "to_width_one": Sides(_geometry(3, 2, 8, 2), _geometry(3, 2, 1, 2)),
    "from_width_one": Sides(_geometry(3, 2, 1, 2), _geometry(3, 2, 6, 2)),
    "wider_student": Sides(_geometry(4, 2, 4, 4), _geometry(3, 8, 16, 8)),
    "odd": Sides(_geometry(7, 3, 7, 9), _geometry(5, 5, 3, 5)),
    "no_queries": Sides(_geometry(4, 4, 8, 0), _geometry(3, 2, 4, 0)),
}
"""Pairs of models by name; most tests use the first."""

EXTENTS: tuple[tuple[int, int], ...] = ((2, 5), (1, 5), (3, 1), (2, 0))
"""``batch`` and ``time`` of the tests of shapes."""
