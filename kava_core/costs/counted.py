"""Define what is counted: bytes of a number, a model's cost, a store's size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


TRAINED_COPIES = 3
"""Beside a trained weight, in its dtype: the gradient and AdamW's two moments."""


@dataclass(frozen=True)
class ModelCost:
    """One model of the run."""

    name: str
    geometry: str
    parameters: int
    trainable: int
    weights: int
    """Bytes of the weights, and of gradients and AdamW's two moments where trained."""
    flops: float
    """Of one forward pass (teachers) or forward and backward pass (student) over a batch."""
    vocabulary: int
    rotary: bool
    """Whether keys and queries are rotated."""
    note: str = ""
    """Where the vocabulary, and with it every count, is not the run's."""
    block: int = 0
    """Bytes of the largest decoder layer's weights."""
    outside: int = 0
    """Bytes of the weights outside of the decoder layers."""
    trained: int = 0
    """Bytes of the weights that are trained."""


@dataclass(frozen=True)
class StoreSize:
    """What ``kava cache`` would write."""

    token: int
    """Bytes of all teachers' targets at one student position."""
    time: int
    """Student tokens that an example is taken to have."""
    examples: int | None
    """Training and validation examples; None where only reading the data would tell."""


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


WEIGHTS, STATE = "teachers: weights", "student: weights, gradients, optimizer"
