"""Compute attention again from captured queries and keys: its entropy and its output.

Plain softmax attention with the layer's own scale, which captured queries hold, and its sliding window,
causal except in an encoder. Attention sinks, caps on the scores and T5's position biases are left out. One
layer and a block of query positions are computed at a time, so that no map of all positions against all has
to be held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.kv.capture.attention_layers import attention_layers
from kava_core.kv.capture.geometry import ENCODER
from kava_core.kv.maths.masks import widen

BLOCK = 128
"""Query positions at a time."""


@dataclass(frozen=True)
class AttentionRule:
    """How one layer attends."""

    scale: float
    """Scores are multiplied by this."""
    window: int | None = None
    """How many positions a query sees, its own included; None: all up to its own."""
    causal: bool = True
    """Whether a query sees no later positions."""


def attention_rules(model: nn.Module, layers: tuple[int, ...], dim: int) -> list[AttentionRule]:
    """Return how these attention layers attend to captured keys; ``dim`` is the width of a head."""
    modules = attention_layers(model)
    return [_module_rule(modules[layer], dim) for layer in layers]


def _module_rule(module: Any, dim: int) -> AttentionRule:
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return AttentionRule(
        dim**-0.5,
        window if isinstance(window, int) else None,
        causal=not getattr(module.config, ENCODER, False),
    )


def attention_blocks(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: AttentionRule,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for every block of query positions: which, the weights of the keys, and which keys each sees.

    Weights are ``batch head tap time t_time``, ``tap`` being the query heads that share a key head; which
    keys are seen is ``batch time t_time``. A query that sees nothing has NaN.
    """
    queries = rearrange(
        widen(queries), "batch (head tap) time dim -> batch head tap time dim", head=keys.shape[1]
    )
    keys = torch.where(live[:, None, :, None], widen(keys), 0)[:, :, None]
    positions = torch.arange(live.shape[1], device=live.device)
    window = rule.window or len(positions)
    for begin in range(0, len(positions), BLOCK):
        block = slice(begin, begin + BLOCK)
        distance = positions[block, None] - positions
        in_reach = ((distance >= 0) | (not rule.causal)) & (distance < window)
        seen = in_reach & live[:, None]
        scores = (queries[:, :, :, block] @ keys.mT) * rule.scale
        yield block, scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1), seen


def attention_entropy(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: AttentionRule,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Return the entropy of attention: in nats, and as a share of the log of how many keys a query sees.

    Both are means over query heads, and NaN at dead positions. The share is NaN also for a query that sees a
    single key, whose entropy can only be 0.
    """
    nats, shares = [], []
    for block, weights, seen in attention_blocks(queries, keys, live, rule):
        entropy = torch.special.entr(weights).sum(-1).mean((1, 2)).masked_fill(~live[:, block], torch.nan)
        largest = seen.sum(-1).to(entropy.dtype).log()
        nats.append(entropy)
        shares.append(torch.where(largest > 0, entropy / largest, torch.nan))
    return torch.cat(nats, 1), torch.cat(shares, 1)


def attention_output(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    values: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: AttentionRule,
) -> Float[Tensor, "batch qhead time dim"]:
    """Return softmax(queries · keys) · values; NaN for queries that see nothing."""
    values = torch.where(live[:, None, :, None], widen(values), 0)[:, :, None]
    blocks = [weights @ values for _, weights, _ in attention_blocks(queries, keys, live, rule)]
    return rearrange(torch.cat(blocks, 3), "batch head tap time dim -> batch (head tap) time dim")
