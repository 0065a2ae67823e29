"""Cut a teacher's cache down to the tokens an evictor keeps, which differ between layers and heads.

Source: KaVa (arXiv 2510.02312).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kava_core.config import ComponentConfig, Part
from kava_core.errors import SpecError
from kava_core.kv.align.boundaries import attribute_errors_to
from kava_core.kv.align.layer_map import LayerMap
from kava_core.kv.align.returned import require_evictions
from kava_core.kv.align.watched_call import call_component
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.maths.masks import widen, without_autocast
from kava_core.protocols.axes import PARTS, Cache
from kava_core.protocols.time_warper import Evictor, Scores
from kava_core.protocols.timeline import REASONING, Timeline


class Eviction:
    """Cuts one teacher's reasoning tokens down to a fixed number of slots.

    Args:
        evictor: chooses the tokens from keys and queries as attention saw them, that is rotated.
        slots: how many tokens are kept: as many as the student has latent tokens.
        parts: which of keys, values and queries the losses compare.
        rotary: as in the spec; with ``keep`` the kept keys stay rotated.
        who: how errors name the evictor.
        config: its declaration, for error notes; None: they name no distribution.
    """

    def __init__(
        self,
        evictor: Evictor,
        slots: int,
        *,
        parts: tuple[Part, ...],
        rotary: Literal["strip", "keep", "match"],
        who: str,
        config: ComponentConfig | None = None,
    ) -> None:
        self.config = config
        self.evictor, self.slots, self.parts, self.who = evictor, slots, parts, who
        self.seen = tuple(part for part in PARTS if part in {*parts, *evictor.reads})
        """Parts to capture."""
        self.rotary: Literal["keep", "match"] = "keep" if rotary == "keep" else "match"
        """How to capture them."""

    @torch.no_grad()
    def __call__(self, cache: Cache, rotation: Rotation | None, side: Mapping[str, Tensor]) -> Cache:
        """Return the compared parts of the kept tokens, each ``batch t_layer t_head slot dim``.

        Keys are returned without ``rotation``.

        Args:
            cache: of one forward pass, captured with ``seen`` and ``rotary``.
            rotation: of that pass, which is undone; None: there is none, or it stays.
            side: the collator's tensors of the teacher's side.
        """
        timeline = Timeline.from_batch(side)
        with without_autocast(cache.any.device):
            positions = self._choose_positions(cache, timeline)
            kept = cache.pick(self.parts)
            if rotation is not None:  # before the tokens are moved: the angles are of their old positions
                kept = kept.map(lambda x, part: x if part == "values" else rotation.undo(widen(x)))
            return evicted_cache(kept, positions, filled_slots(timeline, self.slots))

    def _choose_positions(self, cache: Cache, timeline: Timeline) -> Int[Tensor, "batch t_layer t_head _"]:
        heads = cache.pick(tuple(part for part in self.seen if part != "queries")).any.shape[:3]
        with attribute_errors_to(self.who, self.config):
            positions = call_component(self.evictor, cache, timeline, self.slots, method="choose")
            filled = filled_slots(timeline, self.slots)
            return require_evictions(positions, (*heads, self.slots), timeline, filled)

    @torch.no_grad()
    def scores(self, cache: Cache, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the evictor chooses tokens by.

        Args:
            cache: of one forward pass, captured with ``seen`` and ``rotary``.
            side: the collator's tensors of the teacher's side.

        Returns:
            Scores by name, each ``batch t_layer t_head t_time``, −inf at tokens that are no reasoning. Empty
                if the evictor has no scores, as the random one.
        """
        if not isinstance(self.evictor, Scores):
            return {}
        timeline = Timeline.from_batch(side)
        with without_autocast(cache.any.device), attribute_errors_to(self.who, self.config):
            return call_component(self.evictor, cache, timeline, method="scores")


def evicted_cache(
    cache: Cache, positions: Int[Tensor, "batch t_layer t_head _"], filled: Bool[Tensor, "batch _"]
) -> Cache:
    """Gather keys and values at the chosen positions; slots that hold no token are zero.

    Args:
        cache: each part ``batch t_layer t_head t_time dim``.
        positions: for each slot the position it is read from.
        filled: True for slots that hold a token.

    Raises:
        SpecError: the cache holds queries, which have no key–value head whose choice they could share.
    """
    if cache.queries is not None:
        raise SpecError("queries of an evicted teacher cannot be compared")
    is_filled = filled[:, None, None, :, None]

    def gather(x: Tensor, _: Part) -> Tensor:
        if not x.shape[3]:
            return x.new_zeros(*positions.shape, x.shape[4])
        index = positions[..., None].expand(*positions.shape, x.shape[4])
        return torch.where(is_filled, x.gather(3, index), 0)

    return cache.map(gather)


def filled_slots(timeline: Timeline, count: int) -> Bool[Tensor, "batch _"]:
    """Return which of ``count`` slots hold a token: as many slots as the example has reasoning tokens."""
    tokens = (timeline.mask & (timeline.segments == REASONING)).sum(1, keepdim=True)
    return torch.arange(count, device=tokens.device) < tokens


def assert_evicts(layer_map: LayerMap, parts: tuple[Part, ...], *, warper: str) -> None:
    """Check that what an evictor keeps can be compared.

    A mean of teacher layers, or several side by side, would mix tokens of different places. So does a head
    adapter that mixes heads; that is not refused, as nothing else may bring them to the student's number.

    Args:
        layer_map: which teacher layers are read, and how they are combined.
        parts: what the losses compare.
        warper: the evicting time warper's registered name, for the error.

    Raises:
        SpecError: a student layer reads several teacher layers, or queries are compared.
    """
    who = f"time_warper {warper!r} keeps other tokens in every layer and head"
    if not layer_map.single or layer_map.joined > 1:
        raise SpecError(f"{who}: every student layer must read one teacher layer; use layer_mapper ratio")
    if "queries" in parts:
        raise SpecError(f"{who}: losses must compare keys and values alone, no queries")
