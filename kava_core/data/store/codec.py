"""How numbers lie in a store, and how they become float32 again."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

StoredDtype = Literal["bfloat16", "int8", "float32"]

LARGEST_CODE = 127
"""Largest magnitude of a stored int8; -128 is not used, so that the code is symmetric."""
SCALE_BYTES = 4


def bytes_per_vector(dim: int, dtype: StoredDtype) -> int:
    """Bytes of the ``dim`` numbers of one layer, head and position, with their scale."""
    return dim * getattr(torch, dtype).itemsize + (SCALE_BYTES if dtype == "int8" else 0)


def encode_vectors(x: Float[Tensor, "*_ dim"], dtype: StoredDtype) -> tuple[Tensor, Tensor | None]:
    """Numbers as they are stored, and for int8 their float32 scales (``x`` without its last axis).

    The int8 code is ``round(x / scale)`` with ``scale = max|x| / 127`` over ``dim``: no number is off by
    more than half its scale, and zeros stay zeros.
    """
    if dtype != "int8":
        return x.to(getattr(torch, dtype)), None
    scale = x.float().abs().amax(-1) / LARGEST_CODE
    steps = x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale


def decode_vectors(stored: Tensor, scale: Tensor | None) -> Float[Tensor, "*_ dim"]:
    """What ``encode_vectors`` made, in float32."""
    numbers = stored.float()
    return numbers if scale is None else numbers * scale[..., None]
