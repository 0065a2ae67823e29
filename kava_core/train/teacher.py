"""A frozen model whose cache is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.axes import Cache
from kava_core.kv.capture import Capture


class Teacher:
    """Runs a model without gradients and returns the cache of the layers its aligner reads.

    Nothing after the last of these layers is run, the language-model head never. Not a module on purpose: it
    is not trained, saved or wrapped.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        layers: tuple[int, ...],
        parts: tuple[Part, ...],
        rotary: Literal["strip", "keep", "match"],
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        undo: Literal["strip", "keep"] = "keep" if rotary == "keep" else "strip"
        self.capture = Capture(model, layers=layers, parts=parts, rotary=undo, stop=True)

    def to(self, device: torch.device) -> None:
        """Move the model; nothing else would, as it stands outside the trained module."""
        self.model.to(device)

    @torch.no_grad()
    def cache(self, side: Mapping[str, Tensor]) -> Cache:
        """The cache of a batch: ``batch layer head time dim`` a part, with the layers asked for."""
        with self.capture:
            self.model.base_model(
                input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False
            )
        return self.capture.take()
