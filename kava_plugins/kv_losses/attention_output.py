"""Compare what attention hands on: softmax(queries · keys) · values of each side.

Agreement of attention outputs predicted the quality kept after mapping caches between models better than the
fit of keys and values did (r = 0.57 against −0.20, arXiv 2608.03893).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.kv.maths.masks import live, select, weighted_sum, widen, without_autocast
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import AttentionOutputConfig
from kava_plugins.kv_losses._model_attention import require_products
from kava_plugins.kv_losses.mercator import one_minus_cosine

DEAD_PRODUCT = -1e30
"""Product of any query with a key of weight 0."""

ALIGNED = 8
"""Fused kernels want widths that are multiples of this."""


class AttentionOutput(nn.Module):
    """Mean over query heads of 1 − cos, or of the mean squared difference, of both sides' outputs.

    Raises:
        SpecError: a model attends by more than queries and keys, or caps its logits: fused kernels do not.
    """

    def __init__(self, config: AttentionOutputConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        require_products("attention_output", teacher=teacher, student=student, softcap=False)
        self.form, self.causal, self.temperature = config.form, config.causal, config.temperature

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions and layers."""
        where = live(weight)
        with without_autocast(weight.device):
            output, t_output = self._output_of_cache(student, where), self._output_of_cache(target, where)
            if self.form == "cosine":
                return weighted_sum(one_minus_cosine(output, t_output, where), weight)
            return weighted_sum(select(output - t_output, where).square(), weight)

    def _output_of_cache(self, cache: Cache, where: Tensor) -> Tensor:
        tensors = {part: select(widen(x), where) for part, x in cache.items()}
        return attention_output(
            queries=tensors["queries"],
            keys=tensors["keys"],
            values=tensors["values"],
            where=where,
            causal=self.causal,
            temperature=self.temperature,
        )


def attention_output(
    queries: Float[Tensor, "batch layer qhead time dim"],
    keys: Float[Tensor, "batch layer head time dim"],
    values: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
    *,
    causal: bool,
    temperature: float,
) -> Float[Tensor, "batch layer qhead time dim"]:
    """Compute attention over the positions ``where`` by the fused kernels; other outputs are undefined.

    One more column (queries 1, keys −1e30) marks dead keys, not a mask, which would be time × time.
    """
    dim = queries.shape[-1]
    spare = ALIGNED - dim % ALIGNED
    ones = torch.ones_like(queries[..., :1])
    flags = torch.where(where, 0, DEAD_PRODUCT).to(keys.dtype).expand(*keys.shape[:-1], 1)
    queries = F.pad(torch.cat((queries, ones), -1), (0, spare - 1))
    keys = F.pad(torch.cat((keys, flags), -1), (0, spare - 1))
    values = F.pad(values, (0, spare))
    output = F.scaled_dot_product_attention(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        is_causal=causal,
        scale=1 / (dim**0.5 * temperature),
        enable_gqa=True,
    )
    return output[..., :dim].unflatten(0, where.shape[:2])
