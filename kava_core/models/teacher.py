"""Run a frozen model and read its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.align.eviction import Eviction
from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.capture import Capture
from kava_core.models.ledger import Ledger
from kava_core.models.placement import REPLICATED, place_model
from kava_core.protocols.axes import Cache


@dataclass(frozen=True)
class TeacherPass:
    """What one forward pass of a teacher gave."""

    teacher: str
    """The teacher's name."""
    cache: Cache
    """The layers its aligner reads, ``batch t_layer t_head t_time t_dim`` a part; no part if none is kept."""
    logits: Float[Tensor, "batch time vocab"] | None = None
    """If the teacher's logits are distilled."""
    hidden_states: tuple[Float[Tensor, "batch time hidden"], ...] | None = None
    """Embeddings and the output of every layer, if the teacher's hidden states are distilled."""


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
        logits: run to the end, and return the logits of passes that are read with ``keep_outputs``.
        hidden: likewise the hidden states.
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
        self.name, self.logits, self.hidden = name, logits, hidden
        self.eviction = eviction
        self.model = self.prepare_model(model)
        undo_rotation: Literal["strip", "keep", "match"] = "keep" if rotary == "keep" else "strip"
        if eviction is not None:
            parts, undo_rotation = eviction.seen, eviction.rotary
        reads_to_the_end = logits or hidden
        self._make_capture = partial(
            Capture, model, layers=layers, parts=parts, rotary=undo_rotation, stop=not reads_to_the_end
        )
        self.capture = self._make_capture() if layers else None
        self.ledger: Ledger | None = None
        self.depth = 1.0
        """Share of the model's layers that a pass runs."""
        if layers and not reads_to_the_end:
            self.depth = (max(layers) + 1) / len(attention_layers(model))

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model, frozen."""
        return model.eval().requires_grad_(False)

    def to(self, device: torch.device, placement: str = REPLICATED) -> None:
        """Move or divide the model; nothing else would, as it is no part of the trained module.

        Args:
            device: that of the batches, on which the cache is wanted.
            placement: as in ``TeacherSpec.placement``.
        """
        who = f"teacher {self.name!r}"
        self._make_capture = place_model(self.model, self._make_capture, placement, device, who=who)
        self.capture = self._make_capture() if self.capture is not None else None

    def read(self, side: Mapping[str, Any], *, keep_outputs: bool = False) -> TeacherPass:
        """Run the model on a batch and return its cache.

        Args:
            side: the collator's tensors of this teacher's side.
            keep_outputs: also return the logits and hidden states that are distilled.
        """
        if self.capture is None:
            return self._pass_of(Cache(), self._run(side, keep_outputs))
        outputs: Mapping[
            str, Any
        ] = {}  # The capture may leave the forward pass after the last layer it reads.
        with self.capture:
            outputs = self._run(side, keep_outputs)
        seen = self._as_target(self.capture.take())
        if self.eviction is not None:
            seen = self.eviction(seen, self.capture.rotation(), side)
        return self._pass_of(seen, outputs)

    def read_by_layer(
        self, side: Mapping[str, Any], take_layer: Callable[[int, Cache], None], *, keep_outputs: bool = False
    ) -> TeacherPass:
        """Run the model, handing over each layer as soon as it has run; the returned pass holds no cache.

        Args:
            side: the collator's tensors of this teacher's side.
            take_layer: takes the place and the cache of every layer asked for, in their order.
            keep_outputs: as for ``read``.
        """
        capture = self._make_capture(each=take_layer)
        outputs: Mapping[str, Any] = {}
        with capture:
            outputs = self._run(side, keep_outputs)
        capture.done()
        return self._pass_of(Cache(), outputs)

    def cache(self, side: Mapping[str, Any]) -> Cache:
        """Return the cache of a batch: ``batch t_layer t_head t_time t_dim`` a part."""
        return self.read(side).cache

    def eviction_scores(self, side: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the scores that tokens are chosen by, each ``batch t_layer t_head t_time``; runs the model.

        Empty without an eviction.
        """
        if self.eviction is None or self.capture is None:
            return {}
        with self.capture:
            self._run(side, keep_outputs=False)
        return self.eviction.scores(self._as_target(self.capture.take()), side)

    def _as_target(self, cache: Cache) -> Cache:
        """The model runs without gradients, so its cache has none."""
        return cache

    def _pass_of(self, cache: Cache, outputs: Mapping[str, Any]) -> TeacherPass:
        return TeacherPass(self.name, cache, outputs.get("logits"), outputs.get("hidden_states"))

    @torch.no_grad()
    def _run(self, side: Mapping[str, Any], keep_outputs: bool) -> dict[str, Any]:
        return self.run_model(side, keep_outputs)

    def run_model(self, side: Mapping[str, Any], keep_outputs: bool) -> dict[str, Any]:
        """Run the model; return ``logits`` and ``hidden_states`` if they are distilled and kept."""
        keeps_logits = self.logits and keep_outputs
        keeps_hidden_states = self.hidden and keep_outputs
        if self.ledger is not None:
            self.count_pass(self.ledger, side["attention_mask"], head=keeps_logits)
        model = self.model if keeps_logits else self.model.base_model
        options = {"output_hidden_states": True} if keeps_hidden_states else {}
        outputs = model(
            input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False, **options
        )
        kept = {}
        if keeps_logits:
            kept["logits"] = outputs.logits
        if keeps_hidden_states:
            kept["hidden_states"] = outputs.hidden_states
        return kept

    def count_pass(self, ledger: Ledger, mask: Tensor, *, head: bool) -> None:
        """Count a pass over a batch in the ledger.

        Args:
            ledger: of the run.
            mask: the batch's real positions, ``batch time``.
            head: whether the language-model head ran as well.
        """
        ledger.add_tokens(self.name, mask)
        ledger.add_text(self.name, mask, self.depth, head=head)
