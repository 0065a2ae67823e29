"""The student as its own teacher: the same weights read the written steps (CODI, KaVa)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kava_core.models.ledger import STUDENT, Ledger
from kava_core.models.placement import REPLICATED
from kava_core.models.teacher import Teacher
from kava_core.protocols.axes import Cache


class OwnTeacher(Teacher):
    """A teacher whose weights are the student's. Its logits have gradient; its cache is a fixed target.

    Without ``logits`` nothing of it has.
    """

    def prepared(self, model: nn.Module) -> nn.Module:
        """The student as it is: it trains, with its dropout."""
        return model

    def to(self, device: torch.device, placement: str = REPLICATED) -> None:
        """Nothing: the student is moved as what it is."""

    def _seen(self, side: Mapping[str, Tensor]) -> Cache:
        return super()._seen(side).map(lambda x, _: x.detach())

    def note(self, ledger: Ledger, mask: Tensor) -> None:
        """Its tokens are the student's; the pass is counted where the student's are."""
        ledger.add_tokens(STUDENT, mask)

    def _run(self, side: Mapping[str, Tensor]) -> None:
        if self.logits:
            self.forward(side)
            return
        with torch.no_grad():
            self.forward(side)
        # Else the student's own pass would be given copies of its weights that were made without gradient.
        torch.clear_autocast_cache()
