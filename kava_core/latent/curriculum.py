"""From written steps to latent tokens in stages: what is there in a stage (Coconut, arXiv 2412.06769)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from kava_core.data.encode import NO_LABEL
from kava_core.specfile.sections.latent import LatentSpec

ALWAYS = -1
"""The step of tokens that belong to no step."""


def step_of_tokens(spans: Int[Tensor, "time 2"], reasoning: str, separator: str) -> Int[Tensor, " time"]:
    """The step of each token's last character; what stands between two steps belongs to the later one.

    Args:
        spans: half-open character spans in ``reasoning``; what lies beyond it belongs to the last step.
        reasoning: the written steps.
        separator: what stands between them.
    """
    ends, place = [], 0
    for piece in reasoning.split(separator):
        place += len(piece)
        ends += [place] if piece.strip() else []
        place += len(separator)
    return torch.bucketize(spans[:, 1].contiguous(), torch.tensor(ends[:-1], dtype=torch.long))


def latents_at(step: int, latent: LatentSpec) -> int:
    """How many latent tokens there are at an optimizer step; all of them where there is no curriculum."""
    stages = latent.curriculum
    return latent.count if stages is None else min(latent.count, step // stages.steps * stages.tokens)


def side_at_stage(side: Mapping[str, Tensor], latent: LatentSpec, active: int) -> Mapping[str, Tensor]:
    """The student's side with as many latent tokens as are active, without the steps they stand for.

    What is gone is masked and stands first, so that every token still follows the one it is read from.
    """
    if latent.curriculum is None:
        return side
    gone = (side["steps"] != ALWAYS) & (side["steps"] < active // latent.curriculum.tokens)
    order = gone.logical_not().long().argsort(dim=1, stable=True)
    changed = {
        "after": side["after"],
        "after_mask": side["after_mask"].masked_fill(gone, 0),
        "labels": side["labels"].masked_fill(gone, NO_LABEL),
        "steps": side["steps"],
    }
    return {**side, **{name: tensor.gather(1, order) for name, tensor in changed.items()}}
