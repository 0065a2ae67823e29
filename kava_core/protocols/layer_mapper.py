"""Define the contract of layer mappers: ``t_layer → layer``."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class LayerMapper(Protocol):
    """``t_layer → layer``. Constructed as ``LayerMapper(config, *, teacher, student)``."""

    def __call__(self) -> Float[Tensor, "layer t_layer"]:
        """Return the weights of the teacher's layers for every student layer.

        Rows sum to 1. Only teacher layers with a non-zero column are captured, so a mapper without
        parameters must return the same zeros every time. Rows with a single 1 cost nothing.
        """
        ...


@runtime_checkable
class Measured(Protocol):
    """The methods of a layer mapper whose weights come from comparing the layers of both models on data.

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
