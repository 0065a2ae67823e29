"""Define the contract of fusers: weights of several teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.protocols.axes import Cache


@dataclass(frozen=True)
class FusionContext:
    """The tensors and labels that a fuser may look at."""

    valid: Bool[Tensor, "teacher batch time"]
    """Where each teacher's target is valid."""
    targets: tuple[Cache, ...]
    """The aligned caches, one per teacher."""
    student: Cache
    """The student's cache, in the view of the losses."""
    hidden: Float[Tensor, "batch time hidden"] | None = None
    """The student's last hidden states, without gradient; only for a fuser with ``needs_hidden = True``."""
    tasks: tuple[str, ...] | None = None
    """The task label of every example, empty where it has none."""


@runtime_checkable
class Fuser(Protocol):
    """Weighs teachers. Constructed as ``Fuser(config, *, teachers, student)``, teachers being their names.

    A fuser that does not look at ``targets`` has ``needs_targets = False``: with ``train.stream`` it is
    called before the teachers run, and the targets are empty.
    """

    def __call__(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return non-negative weights. kava renormalises them over the teachers valid at a position."""
        ...


@runtime_checkable
class Regularised(Protocol):
    """The method of a fuser that adds a term of its own to the loss."""

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """Return the term: a sum over positions of the mean over layers.

        ``weights`` are the fuser's, renormalised; all teachers' are 0 where none is valid.
        """
        ...


@runtime_checkable
class ObservesTeachers(Protocol):
    """The methods of a fuser that needs to see data before training, after projectors are calibrated."""

    def observe(self, context: FusionContext) -> None:
        """Take in one batch."""
        ...

    def finish(self) -> None:
        """Compute what it needs from everything observed."""
        ...


@runtime_checkable
class Chooses(Protocol):
    """The method of a fuser that does not run all teachers in every forward pass.

    A fuser whose choice is the same in every process has ``draws = False``; others refuse sharded teachers,
    which all processes must run together.
    """

    def choose(self) -> Bool[Tensor, " teacher"]:
        """Choose the teachers that are to run; called before they run and before the weights are needed."""
        ...


@runtime_checkable
class Rewarded(Protocol):
    """The method of a fuser that learns from a reward."""

    def reward(self, value: Float[Tensor, ""]) -> None:
        """Take in the cross-entropy of the student's tokens in this forward pass, after the weights."""
        ...
