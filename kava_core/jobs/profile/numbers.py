"""What a part of a cache holds at one stage: extents, values, rank, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.kv.maths.rank_and_cosine import effective_rank, valid_rows

STILL = 1e-6
"""A channel whose range is at most this share of its layer's largest value is dead."""


@dataclass(frozen=True)
class Numbers:
    """Of one part at one stage, over all batches. Masked positions are left out of everything but ``shape``.

    What there is nothing to compute from is NaN.
    """

    shape: tuple[int, ...]
    """``batch layer head time dim`` of the first batch."""
    dtype: str
    bad: float
    """Share of values that are NaN or infinite; the numbers below are of the others."""
    low: float
    high: float
    mean: float
    std: float
    """Over all values, divided by their number."""
    rank: float
    """Effective rank, mean over heads and over the layers without bad values."""
    dead: float
    """Share of the channels (layer, head, place in the width) that do not change over positions."""
    bad_layers: tuple[int, ...]
    """Places, along the axis ``layer``, of layers with bad values."""


def numbers(
    batches: Sequence[tuple[Float[Tensor, "_ layer head _ dim"], Bool[Tensor, "_ _"]]],
) -> Numbers:
    """Of the same part and stage in every batch, each with where it is real, ``batch time``."""
    rows = torch.cat([valid_rows(x.detach(), valid) for x, valid in batches], 2)
    finite = rows.isfinite()
    values, sound = rows[finite].double(), finite.flatten(1).all(1)
    first = batches[0][0]
    return Numbers(
        tuple(first.shape),
        str(first.dtype).removeprefix("torch."),
        bad=float(1 - finite.double().mean()) if rows.numel() else 0.0,
        **_spread(values),
        rank=float(effective_rank(rows[sound]).mean()) if bool(sound.any()) and rows.numel() else torch.nan,
        dead=_dead(rows[sound]),
        bad_layers=tuple((~sound).nonzero().flatten().tolist()),
    )


def _spread(values: Float[Tensor, " _"]) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("low", "high", "mean", "std"), torch.nan)
    found = {
        "low": values.min(),
        "high": values.max(),
        "mean": values.mean(),
        "std": values.std(correction=0),
    }
    return {name: float(x) for name, x in found.items()}


def _dead(rows: Float[Tensor, "layer head time dim"]) -> float:
    """NaN where fewer than two positions leave it open whether a channel changes."""
    if not rows.numel() or rows.shape[2] < 2:
        return torch.nan
    largest = rows.abs().amax((1, 2, 3), keepdim=True)[:, :, 0]
    return float((rows.amax(2) - rows.amin(2) <= STILL * largest).double().mean())
