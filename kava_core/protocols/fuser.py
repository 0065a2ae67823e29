"""Define the contract of fusers: weights of several teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.protocols.axes import Cache


@dataclass(frozen=True)
class FusionContext:
    """What a fuser may look at."""

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

    One that does not look at ``targets`` says so with ``needs_targets = False``: with ``train.stream`` it is
    asked before the teachers run, and the targets are empty.
    """

    def __call__(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Non-negative weights. kava renormalises them over the teachers valid at a position."""
        ...


@runtime_checkable
class Regularised(Protocol):
    """What a fuser offers if it adds a term of its own to the loss."""

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """A sum over positions, of the mean over layers.

        ``weights`` are the fuser's, renormalised; all teachers' are 0 where none is valid.
        """
        ...


@runtime_checkable
class ObservesTeachers(Protocol):
    """What a fuser offers if it wants to see data before training, after projectors are calibrated."""

    def observe(self, context: FusionContext) -> None:
        """Take in one batch."""
        ...

    def finish(self) -> None:
        """Compute what it needs from everything observed."""
        ...


@runtime_checkable
class Chooses(Protocol):
    """What a fuser offers if not all teachers run in every forward pass.

    One whose choice is the same in every process says so with ``draws = False``; others refuse teachers that
    are sharded, which all processes must run together.
    """

    def choose(self) -> Bool[Tensor, " teacher"]:
        """Which teachers are to run; called before they would, and before the weights are asked for."""
        ...


@runtime_checkable
class Rewarded(Protocol):
    """What a fuser offers if it learns from a reward."""

    def reward(self, value: Float[Tensor, ""]) -> None:
        """Cross-entropy of the student's tokens in this forward pass, after the weights were given."""
        ...
