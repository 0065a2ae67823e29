"""Replace written steps by latent tokens in stages, and prepare a batch for its stage.

Source: Coconut (arXiv 2412.06769).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from kava_core.data.encoding.encode import NO_LABEL
from kava_core.specfile.sections.latent import LatentSpec

ALWAYS = -1
"""The step of tokens that belong to no step."""


def step_of_tokens(spans: Int[Tensor, "time 2"], reasoning: str, separator: str) -> Int[Tensor, " time"]:
    """Return for each token the number of the step that its last character belongs to.

    A separator between two steps belongs to the later one.

    Args:
        spans: half-open character spans in ``reasoning``; what comes after it belongs to the last step.
        reasoning: the written steps.
        separator: the text between two steps.
    """
    ends, position = [], 0
    for piece in reasoning.split(separator):
        position += len(piece)
        if piece.strip():
            ends.append(position)
        position += len(separator)
    return torch.bucketize(spans[:, 1].contiguous(), torch.tensor(ends[:-1], dtype=torch.long))


def latents_at(step: int, latent: LatentSpec) -> int:
    """Return the number of latent tokens at an optimizer step; all of them if there is no curriculum."""
    stages = latent.curriculum
    return latent.count if stages is None else min(latent.count, step // stages.steps * stages.tokens)


def side_at_stage(side: Mapping[str, Tensor], latent: LatentSpec, active: int) -> Mapping[str, Tensor]:
    """Return the student's side without the written steps that the active latent tokens replace.

    What is left out is masked and moved to the front, so that every token still follows the one it is
    predicted from.

    Args:
        side: the collator's tensors of the student's side.
        latent: the spec's section.
        active: number of latent tokens in this stage.
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
    reordered = {name: tensor.gather(1, order) for name, tensor in changed.items()}
    return {**side, **reordered}
