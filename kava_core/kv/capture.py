"""Keys, values and queries of a decoder's attention layers, taken from its forward pass by reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import KavaError, UnsupportedModelError
from kava_core.kv import attention_layers as find
from kava_core.kv.attention_hook import SLOT, RotaryTap, Slot, tap_attention, tap_rotary
from kava_core.kv.axes import Cache
from kava_core.kv.rope import unrotate


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
            leaves them as they are cached.

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
        rotary: Literal["strip", "keep"] = "strip",
    ) -> None:
        self.name, self.parts = find.model_name(model), parts
        self.modules = find.attention_layers(model)
        self.layers = _asked(layers, len(self.modules), self.name)
        self._model, self._strip = model, rotary == "strip" and find.has_rotary(model)
        self._taps = [tap_rotary(module) if self._strip else None for module in self.modules]
        self._checkpointed = find.checkpointed(model)
        self._slots = [
            Slot(f"{self.name}, attention layer {i}", parts if i in self.layers else (), tap)
            for i, tap in enumerate(self._taps)
        ]

    def __enter__(self) -> Self:
        """Arm; KavaError where a capture of this model is open or its checkpointing is reentrant."""
        find.refuse_reentrant(self._checkpointed, self.name)
        if any(SLOT in module.__dict__ for module in self.modules):
            raise KavaError(f"{self.name}: another capture of this model is still open")
        for module, slot in zip(self.modules, self._slots, strict=True):
            tap_attention(module, find.implementation(module, self._model))
            module.__dict__[SLOT] = slot
        self._clear()
        self._arm(+1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disarm; what was captured waits for ``take``, unless the block failed."""
        self._arm(-1)
        for module in self.modules:
            del module.__dict__[SLOT]
        if kind is not None:
            self._clear()

    def take(self) -> Cache:
        """The captured parts ``batch layer head time dim``, layers in the order asked for; forgets them.

        Raises:
            UnsupportedModelError: The attention of some layer did not pass through transformers' interface,
                or the layers have different head counts or widths, or their rotation cannot be undone.
            KavaError: Some layer ran more than once.
        """
        try:
            self._check_seen()
            self._check_rotated()
            return Cache(**{part: self._stack(part) for part in self.parts})
        finally:
            self._clear()

    def _stack(self, part: Part) -> Float[Tensor, "batch layer head time dim"]:
        tensors = [getattr(self._slots[i], part) for i in self.layers]
        self._check_equal(part, tensors)
        if not self._strip or part == "values":
            return _stacked(tensors)
        return self._unrotated(tensors)

    def _unrotated(
        self, tensors: list[Float[Tensor, "batch head time dim"]]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Layers that were rotated by the same angles are stacked and turned back at once."""
        groups = self._by_angles()
        turned = [self._turned_back(_stacked([tensors[i] for i in group]), group[0]) for group in groups]
        order = torch.tensor([i for group in groups for i in group]).argsort()
        whole = torch.cat(turned, dim=1)
        return whole if len(groups) == 1 else whole[:, order.to(whole.device)]

    def _turned_back(
        self, stack: Float[Tensor, "batch layer head time dim"], position: int
    ) -> Float[Tensor, "batch layer head time dim"]:
        slot = self._slots[self.layers[position]]
        if slot.angles is None or slot.rotary is None:
            return stack
        cos, sin = slot.angles.cos.to(stack.device), slot.angles.sin.to(stack.device)
        return unrotate(stack, cos, sin, slot.rotary.apply, slot.angles.width)

    def _by_angles(self) -> list[list[int]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for position, layer in enumerate(self.layers):
            angles = self._slots[layer].angles
            key = (id(angles.cos), angles.width) if angles is not None else (0, 0)
            groups.setdefault(key, []).append(position)
        return list(groups.values())

    def _arm(self, step: int) -> None:
        for tap in {id(tap): tap for tap in self._taps if tap is not None}.values():
            tap.armed += step
            tap.last = None

    def _clear(self) -> None:
        for slot in self._slots:
            slot.clear()

    def _check_seen(self) -> None:
        missing = [i for i in self.layers if self._slots[i].seen == 0]
        if len(missing) == len(self.layers):
            raise UnsupportedModelError(
                f"{self.name}: no attention layer could be captured: either no forward pass ran inside the "
                "with-block, or its attention bypasses transformers' AttentionInterface"
            )
        if missing:
            raise UnsupportedModelError(f"{self.name}: attention layers {_listed(missing)} were not captured")
        twice = [i for i in self.layers if self._slots[i].seen > 1]
        if twice:
            raise KavaError(f"{self.name}: attention layers {_listed(twice)} were captured more than once")

    def _check_rotated(self) -> None:
        if self._strip and (None in self._taps or all(slot.angles is None for slot in self._slots)):
            raise UnsupportedModelError(
                f"{self.name}: its rotation of keys cannot be undone, as it does not call an "
                "apply_rotary_pos_emb(q, k, cos, sin); use rotary: keep"
            )

    def _check_equal(self, part: Part, tensors: list[Tensor]) -> None:
        first = tensors[0].shape
        others = [i for i, tensor in zip(self.layers, tensors, strict=True) if tensor.shape != first]
        if others:
            odd = tensors[self.layers.index(others[0])].shape
            raise UnsupportedModelError(
                f"{self.name}: {part} of attention layers {_listed(others)} differ from layer {self.layers[0]}: "
                f"{odd[1]} heads × {odd[3]} at {odd[2]} positions, not {first[1]} × {first[3]} at {first[2]}"
            )


def _asked(layers: Sequence[int] | None, count: int, name: str) -> tuple[int, ...]:
    asked = tuple(range(count)) if layers is None else tuple(layers)
    if not asked or not set(asked) <= set(range(count)) or len(set(asked)) < len(asked):
        raise KavaError(
            f"{name}: cannot capture attention layers {_listed(asked)}; "
            f"give different numbers from 0 to {count - 1}, at least one"
        )
    return asked


def _stacked(tensors: list[Tensor]) -> Float[Tensor, "batch layer head time dim"]:
    """Layers may live on several devices; the stack lives on the first one's."""
    device = tensors[0].device
    return rearrange(
        [tensor.to(device) for tensor in tensors], "layer batch head time dim -> batch layer head time dim"
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "(none)"
