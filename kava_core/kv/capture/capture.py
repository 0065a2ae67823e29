"""Capture keys, values and queries of a decoder's attention layers from its forward pass, by reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal

from torch import nn

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.capture import attention_layers as find
from kava_core.kv.capture.logit_rule import common_logits
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.capture.stacking import (
    check_rotated,
    check_seen,
    list_layers,
    logit_rules,
    rotation_of,
    stack_layers,
)
from kava_core.kv.capture.taps import SLOT, Slot, StopForward, tap_attention, tap_rotary
from kava_core.protocols.attention_logits import PRODUCTS, AttentionLogits
from kava_core.protocols.axes import Cache


class Capture:
    """Capture attention layers while a with-block is open::

        capture = Capture(model)
        with capture:
            output = model(input_ids, attention_mask=mask, use_cache=False)
        cache = capture.take()

    Outputs are bit-identical with and without. Gradients flow through the captured tensors, also under
    non-reentrant gradient checkpointing, PEFT and autocast; run teachers under ``torch.no_grad``.

    Args:
        model: A transformers decoder, its base model, or a PeftModel around it.
        layers: Which attention layers, counted over the model's attention layers from 0; None: all.
        parts: Which tensors.
        rotary: ``strip`` undoes the model's own rotation of keys and queries, in float32 at least; ``keep``
            leaves them as they are cached; so does ``match``, and ``rotation`` returns how they were rotated.
        stop: Leave the forward pass after the last of ``layers``: the with-block ends there, and nothing that
            stands in it after the model's call is run. Ignored for a model that is sharded, offloaded or
            compiled, whose own hooks must run to the end.
        look_at_masks: Look for a bias in the values of attention masks, for ``logits``; a GPU is waited for.
        each: Called with every layer's place among ``layers`` and its cache, with an axis ``layer`` of 1, as
            soon as the layer has made it; nothing is kept, and ``done`` takes the place of ``take``.

    Raises:
        UnsupportedModelError: The model has no attention layer, or is no decoder.
        KavaError: A layer is asked for that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        parts: tuple[Part, ...] = ("keys", "values"),
        rotary: Literal["strip", "keep", "match"] = "strip",
        stop: bool = False,
        look_at_masks: bool = False,
        each: Callable[[int, Cache], None] | None = None,
    ) -> None:
        self.name, self.parts = find.model_name(model), parts
        self.modules = find.attention_layers(model)
        self.layers = _asked(layers, len(self.modules), self.name)
        self._model, self._strip = model, rotary == "strip"
        self._followed = rotary != "keep" and find.has_rotary(model)
        self._taps = [tap_rotary(module) if self._followed else None for module in self.modules]
        self._rotation: Rotation | None = None
        self._logits = PRODUCTS
        self._checkpointed = find.is_checkpointed(model)
        last = max(self.layers) if stop and not find.with_hooks(model) else None
        self._slots = []
        for layer, tap in enumerate(self._taps):
            wanted = parts if layer in self.layers else ()
            self._slots.append(Slot(self.name, layer, wanted, tap, strip=self._strip, last=layer == last))
        for slot in self._slots:
            slot.looks_at_mask = look_at_masks
        self._each = each
        if each is not None:
            for slot in self._slots:
                slot.then = self._hand_over

    def __enter__(self) -> Capture:
        """Start to capture.

        Raises:
            KavaError: another capture of this model is open, or its gradient checkpointing is reentrant.
        """
        find.refuse_reentrant(self._checkpointed, self.name)
        if any(SLOT in module.__dict__ for module in self.modules):
            raise KavaError(f"{self.name}: another capture of this model is still open")
        self._clear()
        self._rotation = None
        for module, slot in zip(self.modules, self._slots, strict=True):
            tap_attention(module, find.attention_implementation(module, self._model))
            module.__dict__[SLOT] = slot
        self._arm(+1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Stop capturing; what was captured is kept for ``take``, unless the block failed."""
        self._arm(-1)
        for module in self.modules:
            del module.__dict__[SLOT]
        stopped = kind is not None and issubclass(kind, StopForward)
        if kind is not None and not stopped:
            self._clear()
        return stopped

    def take(self) -> Cache:
        """Return the captured parts, each ``batch layer head time dim``, and forget them.

        Layers are in the order asked for.

        Raises:
            UnsupportedModelError: The attention of some layer did not pass through transformers' interface,
                or the layers have different head counts or widths, or their rotation cannot be undone.
            KavaError: Some layer ran more than once.
        """
        asked = [self._slots[i] for i in self.layers]
        try:
            self._check(asked)
            self._logits = common_logits(logit_rules(asked))
            if self._followed:
                self._rotation = rotation_of(asked)
            undo = self._rotation if self._strip and not all(slot.plain for slot in asked) else None
            return Cache(**{part: stack_layers(asked, part, undo) for part in self.parts})
        finally:
            self._clear()

    def done(self) -> None:
        """Check, with ``each``, that every layer was handed over once.

        Raises:
            UnsupportedModelError, KavaError: As for ``take``.
        """
        try:
            self._check([self._slots[i] for i in self.layers])
        finally:
            self._clear()

    def _check(self, asked: list[Slot]) -> None:
        check_seen(asked)
        if self._followed:
            check_rotated(self._slots)

    def _hand_over(self, slot: Slot) -> None:
        assert self._each is not None
        undo = rotation_of([slot]) if self._followed and self._strip else None
        cache = Cache(**{part: stack_layers([slot], part, undo) for part in self.parts})
        slot.drop()
        self._each(self.layers.index(slot.layer), cache)

    def rotation(self) -> Rotation | None:
        """Return how the forward pass taken last rotated the layers asked for, in their order.

        None for a model without rotary embeddings, and with ``keep``.
        """
        return self._rotation

    def logits(self) -> AttentionLogits:
        """Return how the layers taken last make logits of their queries and keys, beyond a product."""
        return self._logits

    def _arm(self, step: int) -> None:
        # Layers of one modeling file share a tap.
        taps = {id(tap): tap for tap in self._taps if tap is not None}
        for tap in taps.values():
            tap.armed += step
            tap.last = None

    def _clear(self) -> None:
        for slot in self._slots:
            slot.clear()


def _asked(layers: Sequence[int] | None, count: int, name: str) -> tuple[int, ...]:
    asked = tuple(range(count)) if layers is None else tuple(layers)
    if not asked or not set(asked) <= set(range(count)) or len(set(asked)) < len(asked):
        raise KavaError(
            f"{name}: cannot capture attention layers {list_layers(asked)}; "
            f"give different numbers from 0 to {count - 1}, at least one"
        )
    return asked
