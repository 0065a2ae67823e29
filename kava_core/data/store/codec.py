"""Encode numbers as a store keeps them, and decode them to float32."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

StoredDtype = Literal["bfloat16", "int8", "float32"]

LARGEST_CODE = 127
"""Largest magnitude of a stored int8; -128 is not used, so that the code is symmetric."""
SCALE_BYTES = 4
"""Bytes of a float32 scale."""


def bytes_per_vector(dim: int, dtype: StoredDtype) -> int:
    """Return the bytes of the ``dim`` numbers of one layer, head and position, with their scale."""
    scale_bytes = SCALE_BYTES if dtype == "int8" else 0
    return dim * getattr(torch, dtype).itemsize + scale_bytes


def encode_vectors(vectors: Float[Tensor, "*_ dim"], dtype: StoredDtype) -> tuple[Tensor, Tensor | None]:
    """Return numbers as they are stored, and for int8 their float32 scales (without the axis ``dim``).

    The int8 code is ``round(x / scale)`` with ``scale = max|x| / 127`` over ``dim``: no number is off by
    more than half its scale, and zeros stay zeros.
    """
    if dtype != "int8":
        return vectors.to(getattr(torch, dtype)), None
    scale = vectors.float().abs().amax(-1) / LARGEST_CODE
    # A vector of zeros has scale 0, and must not become NaN.
    divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (vectors.float() / divisor[..., None]).round()
    return codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale


def decode_vectors(stored: Tensor, scale: Tensor | None) -> Float[Tensor, "*_ dim"]:
    """Return in float32 what ``encode_vectors`` stored."""
    numbers = stored.float()
    return numbers if scale is None else numbers * scale[..., None]
