"""Let the student be its own teacher: the same weights read the written steps (CODI, KaVa)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kava_core.models.ledger import STUDENT, Ledger
from kava_core.models.placement import REPLICATED
from kava_core.models.teacher import Teacher
from kava_core.protocols.axes import Cache


class OwnTeacher(Teacher):
    """A teacher whose weights are the student's. Its logits have gradient; its cache is a fixed target.

    Without ``logits`` nothing of it has gradient.

    Source: CODI (arXiv 2502.21074), KaVa (arXiv 2510.02312).
    """

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the student as it is: it trains, with its dropout."""
        return model

    def to(self, device: torch.device, placement: str = REPLICATED) -> None:
        """Do nothing: the model is moved as the student."""

    def _as_target(self, cache: Cache) -> Cache:
        return cache.map(lambda x, _: x.detach())

    def count_pass(self, ledger: Ledger, mask: Tensor, *, head: bool) -> None:
        """Count the batch's tokens as the student's; the pass itself is counted with the student's passes."""
        ledger.add_tokens(STUDENT, mask)

    def _run(self, side: Mapping[str, Any], keep_outputs: bool) -> dict[str, Any]:
        if self.logits:
            return self.run_model(side, keep_outputs)
        with torch.no_grad():
            outputs = self.run_model(side, keep_outputs)
        # Else the student's own pass would be given copies of its weights that were made without gradient.
        torch.clear_autocast_cache()
        return outputs
