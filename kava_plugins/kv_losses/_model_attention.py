"""Ask both models whether their attention can be computed from queries and keys, and how it is capped."""

from __future__ import annotations

from typing import NamedTuple

from kava_core.protocols.axes import Geometry


class Softcaps(NamedTuple):
    """Soft caps of both sides' attention logits; None: not capped."""

    student: float | None = None
    target: float | None = None


def followed_softcaps(loss: str, *, teacher: Geometry, student: Geometry) -> Softcaps:
    """Return the soft caps of both models.

    Args:
        loss: the loss's registered name, for the error.
        teacher: the target's extents, and how its model attends.
        student: the student's, likewise.

    Raises:
        SpecError: something else than queries, keys and a soft cap decides what a model attends to.
    """
    require_products(loss, teacher=teacher, student=student, softcap=True)
    return Softcaps(student.logits.softcap, teacher.logits.softcap)


def require_products(loss: str, *, teacher: Geometry, student: Geometry, softcap: bool) -> None:
    """Check that a loss can compute both models' attention; raises what ``require_followed`` raises."""
    teacher.logits.require_followed(f"loss {loss!r}, the teacher's queries", softcap=softcap)
    student.logits.require_followed(f"loss {loss!r}, the student's queries", softcap=softcap)
