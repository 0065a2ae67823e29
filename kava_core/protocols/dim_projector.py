"""Define the contract of width projectors: ``t_dim → dim``."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.config import Part


@runtime_checkable
class DimProjector(Protocol):
    """``t_dim → dim``. Constructed as ``DimProjector(config, *, teacher, student)``.

    Both geometries are the head adapter's views.
    """

    def __call__(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Project the width of every head of one part."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """What a projector offers if it wants to see data before training.

    An attribute ``paired = False`` says that ``like`` is not looked at; ``queries_from_keys = True`` that
    queries cannot be projected unless keys were observed.
    """

    def observe(
        self,
        x: Float[Tensor, "batch layer head time t_dim"],
        like: Float[Tensor, "batch layer head time dim"],
        valid: Bool[Tensor, "batch time"],
        part: Part,
    ) -> None:
        """Take in one batch: what will be projected, and what stands on the other side at these positions.

        ``x`` is the teacher's cache with layers, heads and time aligned, ``like`` the student's; with
        ``direction: to_teacher`` the other way round.
        """
        ...

    def finish(self) -> None:
        """Compute the projection from everything observed."""
        ...
