"""Hold a loss's gradient by logits that is formed in its forward pass, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradient_buffer(logits: Tensor, *, wanted: bool) -> Tensor | None:
    """Return zeros to which the blocks of a gradient are written; None if no gradient is wanted.

    Those of float16 are float32: a loss scaler multiplies only in the backward pass, when float16 would have
    lost what is small.
    """
    if not wanted:
        return None
    kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return torch.zeros_like(logits, dtype=kept)


def keep_gradient(ctx: Any, gradient: Tensor | None, logits: Tensor) -> None:
    """Leave a filled buffer for the backward pass of an ``autograd.Function``.

    Args:
        ctx: the function's context.
        gradient: from ``gradient_buffer``; any shape of as many numbers as ``logits``.
        logits: the function's input that the gradient belongs to.
    """
    ctx.save_for_backward(None if gradient is None else gradient.view_as(logits))
    ctx.dtype = logits.dtype


def scaled_gradient(ctx: Any, outer: Tensor) -> Tensor | None:
    """Return the kept gradient times that of the loss, in the dtype of the logits; None if none was kept."""
    (saved,) = ctx.saved_tensors
    return None if saved is None else (saved * outer.to(saved.dtype)).to(ctx.dtype)
