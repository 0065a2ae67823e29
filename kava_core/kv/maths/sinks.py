"""Find attention sinks: positions on which attention rests whatever their tokens say."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import PROMPT, Timeline

DRAINED = 0.4
"""A sink's values are shorter than this share of the usual length, by the mean over layers.

Measured on 24 texts of GSM8K with SmolLM2-135M and Gemma-3-270M, all layers: first tokens 0.24 to 0.28, five
later positions of Gemma (white space, apostrophes) 0.26 to 0.32, the other 9,386 positions 0.51 and more.
"""


def is_first_token(timeline: Timeline) -> Bool[Tensor, "batch time"]:
    """Return whether each position is the first token of a text, which is one of the prompt.

    A latent token is no such token, even if it is the first that is compared.
    """
    return timeline.mask & (timeline.positions == 0) & (timeline.segments == PROMPT)


def value_lengths(values: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch layer time"]:
    """Return the logarithm of the length of every layer's values, over all heads, without gradient."""
    squares = values.detach().float().square().sum(dim=(2, 4))
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).log() / 2


def find_sinks(
    lengths: Float[Tensor, "batch layer time"], mask: Bool[Tensor, "batch time"]
) -> Bool[Tensor, "batch time"]:
    """Return which positions are attention sinks, by their tiny values.

    A head that has nothing to add attends to a sink, whose values add nothing. Hidden states of a sink are
    often massive, but not in every model, and its keys are shorter than others, in some models hardly: values
    tell sinks apart in both models looked at. Fewer than three layers, or only the first ones, tell less.

    Args:
        lengths: by ``value_lengths``, of all layers at hand.
        mask: which positions hold a token.

    Source: Gu et al. 2024, arXiv 2410.10781 (values of sinks are small); Sun et al. 2024, arXiv 2402.17762
    (massive activations).
    """
    length = lengths.mean(1)
    usual = torch.where(mask, length, math.nan).nanmedian(dim=1, keepdim=True).values
    return mask & (length < usual + math.log(DRAINED))


def sinks_of(cache: Cache, mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Return which positions of a cache are attention sinks; none if it holds no values."""
    if cache.values is None or 0 in cache.values.shape:
        return torch.zeros_like(mask)
    return find_sinks(value_lengths(cache.values), mask)


def leave_out(
    time_map: TimeMap,
    teacher: Bool[Tensor, "batch t_time"],
    student: Bool[Tensor, "batch time"] | None = None,
) -> TimeMap:
    """Return the map without some of the student's positions, and without those that read some teacher's.

    Args:
        time_map: of a batch.
        teacher: the teacher's positions that must not be read.
        student: the student's positions to leave out; None: none.
    """
    valid = time_map.valid if student is None else time_map.valid & ~student
    example = time_map.rows // max(valid.shape[1], 1)
    is_read = teacher.flatten()[example * teacher.shape[1] + time_map.index] & (time_map.weight > 0)
    count = torch.zeros(valid.numel(), dtype=torch.long, device=valid.device)
    count = count.index_add_(0, time_map.rows, is_read.long())
    return replace(time_map, valid=valid & (count == 0).view(valid.shape))
