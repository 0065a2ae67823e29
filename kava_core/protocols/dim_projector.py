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
    """The methods of a projector that needs to see data before training.

    With an attribute ``paired = False`` it does not look at ``like``; with ``queries_from_keys = True``
    queries cannot be projected unless keys were observed.
    """

    def observe(
        self,
        x: Float[Tensor, "batch layer head time t_dim"],
        like: Float[Tensor, "batch layer head time dim"],
        valid: Bool[Tensor, "batch time"],
        part: Part,
    ) -> None:
        """Take in one batch of what will be projected, and of what it should resemble.

        Args:
            x: the teacher's cache with layers, heads and time aligned; with ``direction: to_teacher`` the
                student's.
            like: the other side's cache at the same positions.
            valid: which positions count.
            part: which part both are.
        """
        ...

    def finish(self) -> None:
        """Compute the projection from everything observed."""
        ...
