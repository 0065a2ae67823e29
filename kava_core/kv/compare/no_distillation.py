"""Replace the pipeline if no cache is distilled."""

from __future__ import annotations

import torch
from torch import nn

from kava_core.config import ComponentConfig
from kava_core.kv.compare.pipeline import KVPipeline


class NoDistillation(KVPipeline):
    """A pipeline of no teachers and no losses, for runs of cross-entropy (and logits) alone.

    It answers every question that a pipeline is asked: nothing to align, to calibrate, to train or to save.
    """

    def __init__(self) -> None:
        super().__init__(
            [],
            nn.Identity(),
            [],
            compared=(),
            fuser_config=ComponentConfig(name="none"),
            layers=(),
            parts=(),
            separate=True,
            rotates_targets=False,
            hidden=0,
        )
        del self.weights
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64), persistent=False)
