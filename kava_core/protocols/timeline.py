"""Describe the positions of a batch: which are real, where they are, which text they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

PROMPT, REASONING, ANSWER, NOWHERE = 0, 1, 2, -1
"""Segment ids. Padding is NOWHERE."""

SEGMENT_NAMES = ("prompt", "reasoning", "answer")


@dataclass(frozen=True)
class Timeline:
    """One side's positions. Padding may be left or right; the real positions are one block."""

    mask: Bool[Tensor, "batch time"]
    """True at real tokens."""
    positions: Int[Tensor, "batch time"]
    """Position ids: 0 at the first real token; 0 at padding."""
    segments: Int[Tensor, "batch time"]
    """PROMPT, REASONING, ANSWER; NOWHERE at padding. Each segment is one block of tokens."""
    spans: Int[Tensor, "batch time 2"]
    """Half-open character spans in the example's text; zero-width at special tokens and padding."""

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> Timeline:
        """Build a timeline from the collator's tensors: ``attention_mask``, ``segments``, ``spans``."""
        mask = batch["attention_mask"].bool()
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0) * mask
        return cls(mask=mask, positions=positions, segments=batch["segments"], spans=batch["spans"])
