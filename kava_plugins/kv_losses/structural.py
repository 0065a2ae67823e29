"""Compare directions of keys and values, and the attention rows they serve, in one sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import SpecError
from kava_core.kv.maths.masks import live, weighted_sum, widen
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import StructuralConfig
from kava_plugins.kv_losses._attention_divergence import divergence_of_caches
from kava_plugins.kv_losses._model_attention import Softcaps, followed_softcaps
from kava_plugins.kv_losses.mercator import one_minus_cosine


class Structural(nn.Module):
    """``alpha_k · (1 − cos K) + alpha_v · (1 − cos V) + alpha_attn · KL(attention)`` of every position.

    Raises:
        SpecError: ``attention_layers`` names a layer the loss does not look at, or attention is compared of a
            model that attends by more than queries and keys.
    """

    def __init__(self, config: StructuralConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.cosines = {"keys": config.alpha_k, "values": config.alpha_v}
        self.alpha_attn, self.config = config.alpha_attn, config
        self.softcaps = Softcaps()
        if config.alpha_attn > 0:
            self.softcaps = followed_softcaps("structural", teacher=teacher, student=student)
        self.chosen = _layers_from_start(config.attention_layers, student.layer)
        self.share = student.layer / max(1, len(self.chosen))
        self.attention_layers: Tensor
        self.register_buffer(
            "attention_layers", torch.tensor(self.chosen, dtype=torch.long), persistent=False
        )

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions and layers."""
        return self._sum_terms(student, target, weight, self.attention_layers)

    def at_layer(self, row: int) -> Callable[[Cache, Cache, Tensor], Tensor]:
        """Return the loss for caches that hold only the layer at ``row``."""
        # In such a cache the layer has index 0.
        attention_layers = self.attention_layers.new_zeros(int(row in self.chosen))
        return lambda student, target, weight: self._sum_terms(student, target, weight, attention_layers)

    def _sum_terms(self, student: Cache, target: Cache, weight: Tensor, attention_layers: Tensor) -> Tensor:
        terms = []
        for part, alpha in self.cosines.items():
            if alpha > 0:
                terms.append(alpha * _cosine_term(getattr(student, part), getattr(target, part), weight))
        if self.alpha_attn > 0 and len(attention_layers):
            terms.append(self.alpha_attn * self._attention_term(student, target, weight, attention_layers))
        return torch.stack(terms).sum() if terms else 0 * weight.sum()

    def _attention_term(self, student: Cache, target: Cache, weight: Tensor, layers: Tensor) -> Tensor:
        """Compare attention at the chosen layers, whose mean stands for the mean over all."""
        if len(layers) < weight.shape[1]:
            student = student.pick(("keys", "queries")).map(lambda x, _: x.index_select(1, layers))
            target = target.pick(("keys", "queries")).map(lambda x, _: x.index_select(1, layers))
            weight = weight.index_select(1, layers)
        return divergence_of_caches(student, target, weight * self.share, self.config, self.softcaps)


def _cosine_term(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return weighted_sum(one_minus_cosine(widen(x), widen(target), live(weight)), weight)


def _layers_from_start(layers: tuple[int, ...] | str, count: int) -> list[int]:
    if isinstance(layers, str):
        return list(range(count))
    outside = [layer for layer in layers if not -count <= layer < count]
    if outside:
        raise SpecError(
            f"loss 'structural': attention_layers {outside}: the loss looks at {count} layers, "
            f"counted here from 0 to {count - 1}"
        )
    return sorted({layer % count for layer in layers})
