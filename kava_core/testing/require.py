"""Let a test of the kit fail in one sentence: what the contract is and what was seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference, relative to the largest value, that rounding may make. Weights are float32, so
float64 is not better."""


def require(holds: bool, contract: str, seen: str) -> None:
    """Fail with ``contract; seen`` unless it holds."""
    if not holds:
        pytest.fail(f"{contract}; {seen}", pytrace=False)


def require_tensor(value: Any, shape: tuple[int, ...], axes: str, who: str) -> Tensor:
    """Return ``value`` if it is a tensor of this shape, else fail; ``axes`` names the extents."""
    require(isinstance(value, Tensor), f"{who} must return a tensor", f"it returned {type(value).__name__}")
    wanted = f"{who} must return shape {list(shape)} ({axes})"
    require(tuple(value.shape) == shape, wanted, f"it returned {list(value.shape)}")
    tensor: Tensor = value
    return tensor


def require_same(seen: Tensor, wanted: Tensor, contract: str) -> None:
    """Fail unless both hold the same numbers, up to rounding."""
    if seen.shape != wanted.shape:
        require(False, contract, f"the shapes are {list(seen.shape)} and {list(wanted.shape)}")
    if not seen.numel() or torch.equal(seen, wanted):
        return
    difference = largest_difference(seen, wanted)
    scale = max(1.0, float(wanted.detach().abs().max()))
    tolerance = TOLERANCE.get(wanted.dtype, 0.0) * scale
    require(difference <= tolerance, contract, f"it differs by up to {difference:.3g}")


def gradient_of(x: Tensor, name: str) -> Tensor:
    """Return the gradient that a backward pass left if it exists and is finite, else fail."""
    require(x.grad is not None, f"a gradient must reach the {name}", "none arrived")
    gradient = torch.zeros_like(x) if x.grad is None else x.grad
    require_finite(gradient, f"the gradient of the {name} must be finite")
    return gradient


def largest_difference(seen: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference; infinite if only one of two numbers is NaN."""
    seen, wanted = seen.detach().double(), wanted.detach().double()
    distance = (seen - wanted).abs()
    distance = torch.where(seen.isnan() & wanted.isnan(), 0.0, distance)
    return float(distance.nan_to_num(nan=torch.inf).max())


def require_finite(x: Tensor, contract: str) -> None:
    """Fail if a number is NaN or infinite."""
    not_finite = int((~torch.isfinite(x)).sum())
    require(not_finite == 0, contract, f"{not_finite} of {x.numel()} numbers are NaN or infinite")
