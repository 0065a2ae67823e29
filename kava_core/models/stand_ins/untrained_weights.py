"""Give a trained model weights that know nothing and keep the trained ones' scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], Tensor]


@torch.no_grad()
def forget_training(
    model: nn.Module, kind: Literal["random_weights", "shuffled_weights"], *, seed: int
) -> None:
    """Replace every weight tensor of a model, in place, by one without knowledge.

    Norms and biases are replaced like matrices: which channels a trained norm raises is knowledge too, and
    the mean square of its gains, which decides the scale of what a layer writes, is kept either way. Tied
    weights stay tied. Buffers, such as rotary frequencies, belong to the architecture and stay.

    Args:
        model: on the CPU, so that all processes and devices draw the same numbers.
        kind: draw numbers of the tensor's mean and standard deviation, or permute its own.
        seed: decides all numbers.
    """
    draw = _normal_like if kind == "random_weights" else _permuted
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(draw(parameter, generator))


def _normal_like(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a tensor from the normal distribution with the mean and standard deviation of ``weights``."""
    wide = weights.float()
    spread, mean = torch.std_mean(wide, correction=0)
    return torch.randn(wide.shape, generator=generator) * spread + mean


def _permuted(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return the numbers of ``weights`` in a random order."""
    order = torch.randperm(weights.numel(), generator=generator)
    return weights.flatten()[order].view_as(weights)
