"""Compare what each position attends to: the divergence of the rows that queries and keys make."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import SpecError
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import AttentionKLConfig
from kava_plugins.kv_losses._attention_divergence import divergence_of_caches
from kava_plugins.kv_losses._model_attention import followed_softcaps


class AttentionKL(nn.Module):
    """Mean over query heads of the divergence of the rows, in float32 or better.

    Raises:
        SpecError: the target has other query heads than the student, or a model attends by more than queries
            and keys.
    """

    def __init__(self, config: AttentionKLConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        if teacher.qhead != student.qhead:
            raise SpecError(
                f"loss 'attention_kl' compares query head by query head: the student has {student.qhead}, "
                f"the target {teacher.qhead}; use a head_adapter"
            )
        self.config = config
        self.softcaps = followed_softcaps("attention_kl", teacher=teacher, student=student)

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions and layers."""
        return divergence_of_caches(student, target, weight, self.config, self.softcaps)
