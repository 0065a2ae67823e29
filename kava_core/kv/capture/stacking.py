"""Stack what attention layers left in their slots to one tensor a part, or raise why that cannot be."""

from __future__ import annotations

from collections.abc import Iterable

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import KavaError, UnsupportedModelError
from kava_core.kv.capture.logit_rule import LogitRule, fold_scale
from kava_core.kv.capture.rotation import PairedTurn, Rotation
from kava_core.kv.capture.taps import Slot


def stack_layers(
    slots: list[Slot], part: Part, undo: Rotation | None
) -> Float[Tensor, "batch layer head time dim"]:
    """Stack one part of all layers; keys and queries lose the rotation ``undo``, if one is given.

    Queries are scaled so that ``q · k / √dim`` is the logit of the layer's own attention.

    Raises:
        UnsupportedModelError: The layers have different head counts or widths.
    """
    _check_equal(slots, part)
    whole = _stacked(slots, part)
    unrotated = whole if undo is None or part == "values" else undo.undo(whole)
    return fold_scale(unrotated, logit_rules(slots)) if part == "queries" else unrotated


def logit_rules(slots: list[Slot]) -> list[LogitRule]:
    """Return how each layer that ran makes its logits."""
    return [slot.logit_rule for slot in slots if slot.logit_rule is not None]


def rotation_of(slots: list[Slot]) -> Rotation:
    """Return how these layers were rotated; layers rotated by the very same tensors form one turn."""
    turns = []
    for places in _by_angles(slots):
        slot = slots[places[0]]
        function = slot.rotary.apply if slot.rotary is not None else None
        turns.append(PairedTurn(tuple(places), None if slot.plain else slot.angles, function))
    return Rotation(tuple(turns), slots[0].dim)


def check_seen(slots: list[Slot]) -> None:
    """Check that every layer was captured once.

    Raises:
        UnsupportedModelError: a layer was not captured.
        KavaError: a layer was captured more than once.
    """
    name = slots[0].model
    missing = [slot.layer for slot in slots if slot.seen == 0]
    if len(missing) == len(slots):
        raise UnsupportedModelError(
            f"{name}: no attention layer could be captured: either no forward pass ran inside the "
            "with-block, or its attention bypasses transformers' AttentionInterface"
        )
    if missing:
        raise UnsupportedModelError(f"{name}: attention layers {list_layers(missing)} were not captured")
    twice = [slot.layer for slot in slots if slot.seen > 1]
    if twice:
        raise KavaError(f"{name}: attention layers {list_layers(twice)} were captured more than once")


def check_rotated(slots: list[Slot]) -> None:
    """Check that the rotation of keys was seen, for a model with rotary angles.

    Raises:
        UnsupportedModelError: the model rotates its keys in a way that cannot be followed.
    """
    if any(slot.rotary is None for slot in slots) or all(slot.angles is None for slot in slots):
        raise UnsupportedModelError(
            f"{slots[0].model}: its rotation of keys cannot be undone, as it does not call an "
            "apply_rotary_pos_emb(q, k, cos, sin); use rotary: keep"
        )


def list_layers(numbers: Iterable[int]) -> str:
    """Format layer numbers for an error message."""
    return ", ".join(map(str, numbers)) or "(none)"


def _by_angles(slots: list[Slot]) -> list[list[int]]:
    """Positions of the layers that were rotated by the very same tensors, or not at all."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, slot in enumerate(slots):
        turned = slot.angles is not None and not slot.plain
        key = (id(slot.angles.cos), slot.angles.width) if turned else (0, 0)
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def _stacked(slots: list[Slot], part: Part) -> Float[Tensor, "batch layer head time dim"]:
    """Stack the layers on the first one's device; they may come from several."""
    tensors = [getattr(slot, part) for slot in slots]
    on_one_device = [tensor.to(tensors[0].device) for tensor in tensors]
    whole: Tensor = rearrange(on_one_device, "layer batch head time dim -> batch layer head time dim")
    return whole


def _check_equal(slots: list[Slot], part: Part) -> None:
    shapes = {slot.layer: getattr(slot, part).shape for slot in slots}
    first = shapes[slots[0].layer]
    others = [layer for layer, shape in shapes.items() if shape != first]
    if others:
        other = shapes[others[0]]
        raise UnsupportedModelError(
            f"{slots[0].model}: {part} of attention layers {list_layers(others)} differ from "
            f"layer {slots[0].layer}: {other[1]} heads × {other[3]} at {other[2]} positions, "
            f"not {first[1]} × {first[3]} at {first[2]}"
        )
