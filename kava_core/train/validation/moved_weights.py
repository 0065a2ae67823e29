"""Measure which share of the student's weights training has moved at all.

A 16-bit weight stays where it is if an update is less than half a unit in its last place; AdamW's updates are
about as large as the learning rate, whatever the gradient is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kava_core.files import replace_file
from kava_core.models.fsdp import local_part

LOOKED_AT = 4096
"""Numbers of every trained tensor that are compared, evenly spaced."""


def keep_first_weights(student: nn.Module, file: Path) -> None:
    """Keep some numbers of every trained tensor from before the first step, also for a run that is resumed.

    Args:
        student: the model.
        file: where they are kept.
    """
    replace_file(file, save(_some_weights(student)))


def share_of_moved_weights(student: nn.Module, file: Path) -> float | None:
    """Return which share of the kept numbers is another one now; None if none were kept.

    Every tensor counts by its size, of which the same number or fewer are looked at.

    Args:
        student: the model, trained.
        file: of ``keep_first_weights``.
    """
    if not file.exists():
        return None
    before, moved, total = load_file(file), 0.0, 0
    sizes = {name: weight.numel() for name, weight in student.named_parameters()}
    for name, now in _some_weights(student).items():
        if name in before and before[name].shape == now.shape:
            moved += float(now.ne(before[name]).double().mean()) * sizes[name]
            total += sizes[name]
    return moved / total if total else None


def _some_weights(student: nn.Module) -> dict[str, Tensor]:
    kept = {}
    for name, weight in student.named_parameters():
        if weight.requires_grad and weight.numel():
            flat = local_part(weight.detach()).flatten()
            places = torch.linspace(0, len(flat) - 1, min(LOOKED_AT, len(flat)), dtype=torch.float64).long()
            kept[name] = flat[places.to(flat.device)].cpu().clone()
    return kept
