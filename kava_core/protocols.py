"""The six kinds of component: one axis each, and the contract of that axis.

Every component is a ``torch.nn.Module``: its parameters and buffers move, train and are saved with the
student. One with an attribute ``learning_rate`` (float or None) has its parameters trained at that peak
rate instead of ``train.learning_rate``. A head adapter, projector or loss with numbers of its own for every
student layer names these parameters and buffers, whose first axis is the layer, in an attribute ``layered``:
with ``train.stream`` it is called with one layer at a time (or a method ``at_layer(row)`` returns what is
called). Whole tensors, not lists, cross these borders, so that every
element is shape-checked. The boundary functions in ``kava_core.kv.stages`` check what third-party
components return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.config import Part
from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.timeline import Timeline
from kava_core.kv.timemap import TimeMap


@runtime_checkable
class LayerMapper(Protocol):
    """``t_layer → layer``. Constructed as ``LayerMapper(config, *, teacher, student)``."""

    def __call__(self) -> Float[Tensor, "layer t_layer"]:
        """Weights of the teacher's layers for every student layer.

        Rows sum to 1. Only teacher layers with a non-zero column are captured, so a mapper without
        parameters must return the same zeros every time. Rows with a single 1 cost nothing.
        """
        ...


@runtime_checkable
class Measured(Protocol):
    """What a layer mapper offers if its weights come from comparing the layers of both models on data.

    kava measures before the pipeline is built, saves ``state_dict()`` as safetensors, with a ``.json`` of the
    same name that holds its ``sha256`` and ``on``, and builds the mapper again with the config's ``map``
    naming the file, so the config needs a field ``map: str | None = None``.
    """

    on: Literal["hidden", "keys", "values"]
    """What is compared: the layers' outputs, or a part of the cache (rotation undone)."""

    def observe(
        self,
        teacher: Float[Tensor, "batch t_layer time t_dim"],
        student: Float[Tensor, "batch layer time dim"],
        valid: Bool[Tensor, "batch time"],
    ) -> None:
        """Take in one batch, time aligned, all heads side by side in the last axis."""
        ...

    def finish(self) -> None:
        """Compute the weights from everything observed."""
        ...


@runtime_checkable
class HeadAdapter(Protocol):
    """``t_head → head``. Constructed as ``HeadAdapter(config, *, teacher, student)``.

    An adapter may see both caches in another view, as ``flat`` does (one head as wide as all, or all layers
    as one): it says so in ``teacher_view`` (extents after the adapter) and ``student_view``, and ``fold``
    brings the student's tensors into that view.
    """

    teacher_view: Geometry
    student_view: Geometry

    def __call__(
        self, x: Float[Tensor, "batch layer t_head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Map the heads of one part; the other axes stay as they are."""
        ...

    def fold(self, x: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch layer _ time _"]:
        """The student's tensor as ``student_view`` sees it; the identity for most adapters."""
        ...


@runtime_checkable
class TimeWarper(Protocol):
    """``t_time → time``, plus validity. Constructed as ``TimeWarper(config, *, teacher, student)``."""

    def __call__(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The row-stochastic map from the teacher's positions to the student's, one per example."""
        ...


@runtime_checkable
class Evictor(Protocol):
    """What a time warper offers if it chooses tokens for every layer and KV head of the teacher apart.

    Only for a student of latent tokens: the teacher's reasoning tokens are then *evicted* to as many *slots*
    as it has. Called with timelines, the warper gives the map from slots to the student: its k-th reasoning
    token reads slot k, valid where the teacher has more than k reasoning tokens.
    """

    reads: tuple[Part, ...]
    """What it needs of the teacher's cache."""

    def choose(self, cache: Cache, timeline: Timeline, count: int) -> Int[Tensor, "batch t_layer t_head _"]:
        """The teacher's positions for ``count`` slots, reasoning tokens in time order, each once.

        Keys and queries of ``cache`` are as attention saw them, with their rotation. What stands in slots
        beyond the number of reasoning tokens is not read, but must be a position. Padding may hold NaN.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """What an evictor offers if it chooses by scores, of which evaluation logs the spread."""

    def scores(
        self, cache: Cache, timeline: Timeline
    ) -> dict[str, Float[Tensor, "batch t_layer t_head t_time"]]:
        """Every score by name; −inf at what is no reasoning token."""
        ...


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


@runtime_checkable
class KVLoss(Protocol):
    """Student's cache against target. Constructed as ``KVLoss(config, *, teacher, student)``."""

    def __call__(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum over positions and layers of weight × loss at that position.

        The loss of a position is a mean over heads and width. A position of weight 0 has no influence at
        all, whatever it holds, and no gradient. Layers do not look at one another.
        """
        ...


@runtime_checkable
class ObservesCaches(Protocol):
    """What a loss offers if it wants to see data before training, after projectors are calibrated.

    Not with ``rotary: match``, unless it compares values alone.
    """

    def observe(self, student: Cache, target: Cache, valid: Bool[Tensor, "batch time"]) -> None:
        """Take in one batch of what will be compared."""
        ...

    def finish(self) -> None:
        """Compute what it needs from everything observed."""
        ...
