"""A frozen model whose cache is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.align.eviction import Eviction
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from kava_core.models.ledger import Ledger
from kava_core.models.placement import REPLICATED, place_model
from kava_core.protocols.axes import Cache


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
        hidden: likewise the hidden states, for ``take_hidden``.
        eviction: cut the cache down to the tokens it chooses; the cache then has slots in place of time.
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
        hidden: bool = False,
        eviction: Eviction | None = None,
    ) -> None:
        self.name, self.logits, self.hidden, self.listening = name, logits, hidden, False
        self._logits: Tensor | None = None
        self._hidden: tuple[Tensor, ...] | None = None
        self.eviction = eviction
        self.model = self.prepared(model)
        undo: Literal["strip", "keep", "match"] = "keep" if rotary == "keep" else "strip"
        if eviction is not None:
            parts, undo = eviction.seen, eviction.rotary
        self._capture = partial(
            Capture, model, layers=layers, parts=parts, rotary=undo, stop=not (logits or hidden)
        )
        self.capture = self._capture() if layers else None
        self.ledger: Ledger | None = None
        whole = logits or hidden or not layers
        self.depth = 1.0 if whole else (max(layers) + 1) / len(attention_layers(model))

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model, frozen."""
        return model.eval().requires_grad_(False)

    def to(self, device: torch.device, placement: str = REPLICATED) -> None:
        """Move or divide the model; nothing else would, as it stands outside the trained module.

        Args:
            device: that of the batches, on which the cache is wanted.
            placement: as in ``TeacherSpec.placement``.
        """
        self._capture = place_model(
            self.model, self._capture, placement, device, who=f"teacher {self.name!r}"
        )
        self.capture = self._capture() if self.capture is not None else None

    def cache(self, side: Mapping[str, Tensor]) -> Cache:
        """The cache of a batch: ``batch layer head time dim`` a part, with the layers asked for."""
        seen = self._seen(side)
        if self.eviction is None:
            return seen
        assert self.capture is not None
        return self.eviction(seen, self.capture.rotation(), side)

    def scores(self, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By what tokens are chosen, by name: ``batch t_layer t_head t_time``; none without an eviction."""
        return {} if self.eviction is None else self.eviction.scores(self._seen(side), side)

    def _seen(self, side: Mapping[str, Tensor]) -> Cache:
        assert self.capture is not None
        with self.capture:
            self._run(side)
        return self.capture.take()

    def stream(self, side: Mapping[str, Tensor], each: Callable[[int, Cache], None]) -> None:
        """Hand over the layers asked for one by one, as the forward pass makes them; none is kept."""
        capture = self._capture(each=each)
        with capture:
            self._run(side)
        capture.done()

    def read(self, side: Mapping[str, Tensor]) -> None:
        """A forward pass for its logits or hidden states alone."""
        self._run(side)

    def take_logits(self) -> Tensor | None:
        """The logits of the last forward pass, ``batch time vocab``, once; None where there are none."""
        logits, self._logits = self._logits, None
        return logits

    def take_hidden(self) -> tuple[Tensor, ...] | None:
        """The hidden states of the last forward pass, ``batch time hidden`` each: embeddings and layers."""
        hidden, self._hidden = self._hidden, None
        return hidden

    @torch.no_grad()
    def _run(self, side: Mapping[str, Tensor]) -> None:
        self.forward(side)

    def forward(self, side: Mapping[str, Tensor]) -> None:
        """Run the model; keep what is wanted and listened for."""
        if self.ledger is not None:
            self.note(self.ledger, side["attention_mask"])
        heard, told = self.logits and self.listening, self.hidden and self.listening
        model = self.model if heard else self.model.base_model
        text = {name: side[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**text, use_cache=False, **({"output_hidden_states": True} if told else {}))
        self._logits = outputs.logits if heard else None
        self._hidden = outputs.hidden_states if told else None

    def note(self, ledger: Ledger, mask: Tensor) -> None:
        """Enter a pass over this batch into the ledger."""
        ledger.add_tokens(self.name, mask)
        ledger.add_text(self.name, mask, self.depth, head=self.logits and self.listening)
