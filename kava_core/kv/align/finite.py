"""Check values in debug mode: shapes can be right and every number NaN."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.kv.maths.masks import widen
from kava_core.protocols.axes import Cache


def assert_finite(cache: Cache, valid: Bool[Tensor, "batch time"], where: str) -> None:
    """Check that a cache holds no NaN or infinity at valid positions; tensors on the meta device pass.

    Args:
        cache: each part ``batch layer head time dim``.
        valid: the positions that count.
        where: how the error names the cache.

    Raises:
        NonFiniteError: names the part and the layers.
    """
    for part, x in cache.items():
        if x.is_meta:
            continue
        bad_values = ~torch.isfinite(x) & valid[:, None, None, :, None]
        bad_layers = bad_values.any(dim=(0, 2, 3, 4))
        if bad_layers.any():
            layers = bad_layers.nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{where}: {part} of layers {layers} hold NaN or infinity at valid positions"
            )


def part_at_least_float32(x: Tensor, _: Part) -> Tensor:
    """Cast half precision to float32, in which caches are aligned and compared; leave wider dtypes alone."""
    return widen(x)
