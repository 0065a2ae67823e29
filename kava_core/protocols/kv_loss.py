"""Define the contract of KV losses: the student's cache against a target."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.protocols.axes import Cache


@runtime_checkable
class KVLoss(Protocol):
    """Student's cache against target. Constructed as ``KVLoss(config, *, teacher, student)``."""

    def __call__(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions and layers.

        The loss of a position is a mean over heads and width. A position of weight 0 has no influence at
        all, whatever it holds, and no gradient. Layers do not look at one another.
        """
        ...


@runtime_checkable
class ObservesCaches(Protocol):
    """The methods of a loss that needs to see data before training, after projectors are calibrated.

    It cannot be used with ``rotary: match``, unless it compares values alone.
    """

    def observe(self, student: Cache, target: Cache, valid: Bool[Tensor, "batch time"]) -> None:
        """Take in one batch of what will be compared."""
        ...

    def finish(self) -> None:
        """Compute what it needs from everything observed."""
        ...
