"""Debug mode's check of values: shapes can be right and every number NaN."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.protocols.axes import Cache


def assert_finite(cache: Cache, valid: Bool[Tensor, "batch time"], where: str) -> None:
    """NonFiniteError naming the part and the layers with NaN or infinity at a valid position.

    Meta tensors have no values and pass.
    """
    for part, x in cache.items():
        if x.is_meta:
            continue
        bad = (~torch.isfinite(x) & valid[:, None, None, :, None]).any(dim=(0, 2, 3, 4))
        if bad.any():
            layers = bad.nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{where}: {part} of layers {layers} hold NaN or infinity at valid positions"
            )


def part_at_least_float32(x: Tensor, _: Part) -> Tensor:
    """float32 at least: bf16 caches are aligned and compared in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
