"""A frozen model whose cache is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.axes import Cache
from kava_core.kv.capture import Capture
from kava_core.train.placement import REPLICATED, place


class Teacher:
    """Runs a model without gradients and returns the cache of the layers its aligner reads.

    Nothing after the last of these layers is run, unless its logits are wanted. Not a module on purpose: it
    is not trained, saved or wrapped.

    Args:
        name: the teacher's name.
        model: a causal language model.
        layers: attention layers to read; none: nothing is captured.
        parts: what to read of them.
        rotary: as in the spec.
        logits: run to the end, and keep the logits for ``take_logits`` while ``listening`` is set.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        layers: tuple[int, ...],
        parts: tuple[Part, ...],
        rotary: Literal["strip", "keep", "match"],
        logits: bool = False,
    ) -> None:
        self.name, self.logits, self.listening = name, logits, False
        self._logits: Tensor | None = None
        self.model = model.eval().requires_grad_(False)
        undo: Literal["strip", "keep"] = "keep" if rotary == "keep" else "strip"
        self._capture = partial(Capture, model, layers=layers, parts=parts, rotary=undo, stop=not logits)
        self.capture = self._capture() if layers else None

    def to(self, device: torch.device, placement: str = REPLICATED) -> None:
        """Move or divide the model; nothing else would, as it stands outside the trained module.

        Args:
            device: that of the batches, on which the cache is wanted.
            placement: as in ``TeacherSpec.placement``.
        """
        self._capture = place(self.model, self._capture, placement, device, who=f"teacher {self.name!r}")
        self.capture = self._capture() if self.capture is not None else None

    @torch.no_grad()
    def cache(self, side: Mapping[str, Tensor]) -> Cache:
        """The cache of a batch: ``batch layer head time dim`` a part, with the layers asked for."""
        assert self.capture is not None
        with self.capture:
            self._run(side)
        return self.capture.take()

    @torch.no_grad()
    def stream(self, side: Mapping[str, Tensor], each: Callable[[int, Cache], None]) -> None:
        """Hand over the layers asked for one by one, as the forward pass makes them; none is kept."""
        capture = self._capture(each=each)
        with capture:
            self._run(side)
        capture.done()

    @torch.no_grad()
    def read(self, side: Mapping[str, Tensor]) -> None:
        """A forward pass for its logits alone."""
        self._run(side)

    def take_logits(self) -> Tensor | None:
        """The logits of the last forward pass, ``batch time vocab``, once; None where there are none."""
        logits, self._logits = self._logits, None
        return logits

    def _run(self, side: Mapping[str, Tensor]) -> None:
        heard = self.logits and self.listening
        model = self.model if heard else self.model.base_model
        outputs = model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False)
        self._logits = outputs.logits if heard else None
