"""Attention computed again from captured queries and keys: its entropy, and what it hands on.

Plain softmax attention with the layer's own scale and sliding window, causal except in an encoder; attention
sinks, caps on the scores and T5's position biases are not looked at. One layer and a block of query positions
at a time, so that no map of all positions against all has to be held.
"""

from __future__ import annotations

import inspect
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
class Rule:
    """How one layer attends."""

    scale: float
    """Scores are multiplied by this."""
    window: int | None = None
    """A query sees so many positions, its own included; None: all up to its own."""
    causal: bool = True
    """Whether a query sees no later positions."""


def rules(model: nn.Module, layers: tuple[int, ...], dim: int) -> list[Rule]:
    """Of these attention layers, as their modules say; ``dim`` is the width of a head."""
    modules = attention_layers(model)
    return [_rule(modules[layer], dim) for layer in layers]


def _rule(module: Any, dim: int) -> Rule:
    scale = 1.0 if _scales_queries(module) else getattr(module, "scaling", None)
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return Rule(
        dim**-0.5 if scale is None else float(scale),
        window if isinstance(window, int) else None,
        causal=not getattr(module.config, ENCODER, False),
    )


def _scales_queries(module: nn.Module) -> bool:
    """Whether the queries that reach attention are scaled already, as OPT's are; its own code says so."""
    try:
        return "scaling=1.0" in inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return False


def attend(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: Rule,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of query positions: which, the weights of the keys, and which keys each may see.

    Weights are ``batch head tap time t_time``, ``tap`` being the query heads that share a key head; what may
    be seen is ``batch time t_time``. A query that may see nothing has NaN.
    """
    queries = rearrange(
        widen(queries), "batch (head tap) time dim -> batch head tap time dim", head=keys.shape[1]
    )
    keys = torch.where(live[:, None, :, None], widen(keys), 0)[:, :, None]
    place = torch.arange(live.shape[1], device=live.device)
    for begin in range(0, len(place), BLOCK):
        now = slice(begin, begin + BLOCK)
        behind = place[now, None] - place
        seen = ((behind >= 0) | (not rule.causal)) & (behind < (rule.window or len(place))) & live[:, None]
        scores = (queries[:, :, :, now] @ keys.mT) * rule.scale
        yield now, scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1), seen


def entropy(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: Rule,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Mean over query heads, in nats and as a share of the log of how many keys a query sees.

    NaN at dead positions; the share also where a query sees a single key, whose entropy can only be 0.
    """
    nats, shares = [], []
    for now, weights, seen in attend(queries, keys, live, rule):
        found = torch.special.entr(weights).sum(-1).mean((1, 2)).masked_fill(~live[:, now], torch.nan)
        most = seen.sum(-1).to(found.dtype).log()
        nats.append(found)
        shares.append(torch.where(most > 0, found / most, torch.nan))
    return torch.cat(nats, 1), torch.cat(shares, 1)


def handed_on(
    queries: Float[Tensor, "batch qhead time dim"],
    keys: Float[Tensor, "batch head time dim"],
    values: Float[Tensor, "batch head time dim"],
    live: Bool[Tensor, "batch time"],
    rule: Rule,
) -> Float[Tensor, "batch qhead time dim"]:
    """softmax(queries · keys) · values; NaN at queries that see nothing."""
    values = torch.where(live[:, None, :, None], widen(values), 0)[:, :, None]
    found = [weights @ values for _, weights, _ in attend(queries, keys, live, rule)]
    return rearrange(torch.cat(found, 3), "batch head tap time dim -> batch (head tap) time dim")
