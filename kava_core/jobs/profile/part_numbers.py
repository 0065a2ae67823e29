"""Measure one part of a cache at one stage: extents, values, rank, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.kv.maths.rank_and_cosine import effective_rank, valid_rows

STILL = 1e-6
"""A channel is dead if its range is at most this share of its layer's largest value."""


@dataclass(frozen=True)
class PartNumbers:
    """Statistics of one part at one stage over all batches, masked positions left out.

    NaN if there is nothing to compute a number from.
    """

    shape: tuple[int, ...]
    """``batch layer head time dim`` of the first batch, masked positions included."""
    dtype: str
    bad: float
    """Share of values that are NaN or infinite; the numbers below are of the others."""
    low: float
    high: float
    mean: float
    std: float
    """Standard deviation over all values, divided by their number."""
    rank: float
    """Effective rank, a mean over heads and over the layers without bad values."""
    dead: float
    """Share of the channels (layer, head, place in the width) that do not change over positions."""
    bad_layers: tuple[int, ...]
    """Indices, along the axis ``layer``, of layers with bad values."""


def part_numbers(
    batches: Sequence[tuple[Float[Tensor, "_ layer head _ dim"], Bool[Tensor, "_ _"]]],
) -> PartNumbers:
    """Measure the same part and stage of every batch, each given with its real positions, ``batch time``."""
    rows = torch.cat([valid_rows(tensor.detach(), valid) for tensor, valid in batches], 2)
    finite = rows.isfinite()
    sound_layers = finite.flatten(1).all(1)
    has_rank = bool(sound_layers.any()) and rows.numel() > 0
    values = rows[finite].double()
    has_values = len(values) > 0
    first, _ = batches[0]
    return PartNumbers(
        tuple(first.shape),
        str(first.dtype).removeprefix("torch."),
        bad=float(1 - finite.double().mean()) if rows.numel() else 0.0,
        low=float(values.min()) if has_values else torch.nan,
        high=float(values.max()) if has_values else torch.nan,
        mean=float(values.mean()) if has_values else torch.nan,
        std=float(values.std(correction=0)) if has_values else torch.nan,
        rank=float(effective_rank(rows[sound_layers]).mean()) if has_rank else torch.nan,
        dead=_dead_share(rows[sound_layers]),
        bad_layers=tuple((~sound_layers).nonzero().flatten().tolist()),
    )


def _dead_share(rows: Float[Tensor, "layer head time dim"]) -> float:
    """Return the share of dead channels; NaN if fewer than two positions leave open whether they change."""
    if not rows.numel() or rows.shape[2] < 2:
        return torch.nan
    largest = rows.abs().amax((1, 2, 3), keepdim=True)[:, :, 0]
    return float((rows.amax(2) - rows.amin(2) <= STILL * largest).double().mean())
