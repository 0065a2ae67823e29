"""Define the contract of head adapters: ``t_head → head``."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part
from kava_core.protocols.axes import Geometry


@runtime_checkable
class HeadAdapter(Protocol):
    """``t_head → head``. Constructed as ``HeadAdapter(config, *, teacher, student)``.

    An adapter may see both caches in another view, as ``flat`` does: one head as wide as all, or all layers
    as one. ``fold`` brings the student's tensors into that view.
    """

    teacher_view: Geometry
    """Extents of the teacher's cache after the adapter."""
    student_view: Geometry
    """Extents of the student's cache after ``fold``."""

    def __call__(
        self, x: Float[Tensor, "batch layer t_head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Map the heads of one part; the other axes stay as they are."""
        ...

    def fold(self, x: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch layer _ time _"]:
        """Return the student's tensor in the ``student_view``; the identity for most adapters."""
        ...
