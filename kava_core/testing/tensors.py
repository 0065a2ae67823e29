"""Draw random inputs, and change every tensor inside what a component takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.kv.align.watched_call import values_inside
from kava_core.protocols.axes import Cache, Geometry


def draw_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal numbers, the same for the same seed."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def draw_part(
    geometry: Geometry,
    part: Part,
    *,
    batch: int,
    time: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw one part of a cache: ``batch layer head time dim``."""
    shape = (batch, geometry.layer, geometry.heads(part), time, geometry.dim)
    return draw_normal(*shape, seed=seed, dtype=dtype)


def draw_cache(
    geometry: Geometry,
    parts: tuple[Part, ...],
    *,
    batch: int,
    time: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Cache:
    """Draw a cache of these parts, each with its own numbers."""
    tensors = {}
    for order, part in enumerate(parts):
        part_seed = 10 * seed + order
        tensors[part] = draw_part(geometry, part, batch=batch, time=time, seed=part_seed, dtype=dtype)
    return Cache(**tensors)


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of ``value`` with every tensor inside it changed."""
    if isinstance(value, Tensor):
        return change(value)
    inner = {key: change_tensors(entry, change) for key, entry in values_inside(value).items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **inner)
    if isinstance(value, Mapping):
        return inner
    if isinstance(value, tuple | list):
        return getattr(type(value), "_make", type(value))(inner.values())
    return value
