"""Build timelines of one text cut into any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kava_core.protocols.timeline import NOWHERE, SEGMENT_NAMES, Timeline

TEXT = 24
"""Characters of the text; a third each are prompt, reasoning and answer."""

Side = Literal["left", "right"]


def timeline(tokens: Sequence[int], time: int, *, padding: Side = "right") -> Timeline:
    """Build a timeline of ``time`` positions, with the given number of real tokens for each example.

    All examples hold the same text, so two timelines of different tokens are two tokenizers' view of it.
    """
    batch = len(tokens)
    mask = torch.zeros(batch, time, dtype=torch.bool)
    segments = torch.full((batch, time), NOWHERE)
    spans = torch.zeros(batch, time, 2, dtype=torch.long)
    for row, count in enumerate(tokens):
        start = time - count if padding == "left" else 0
        borders = torch.arange(count + 1) * TEXT // max(count, 1)
        real = slice(start, start + count)
        mask[row, real] = True
        segments[row, real] = borders[:-1] * len(SEGMENT_NAMES) // TEXT
        spans[row, real] = torch.stack([borders[:-1], borders[1:]], -1)
    return Timeline.from_batch({"attention_mask": mask, "segments": segments, "spans": spans})
