"""Read how an attention layer makes its logits from the arguments of its own attention call.

A module's attributes would not do: OPT scales its queries beforehand and hands over a scale of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kava_core.kv.maths.masks import widen
from kava_core.protocols.attention_logits import AttentionLogits

ADDED = {
    "position_bias": "adds a position bias to its logits",
    "s_aux": "has sinks beside its keys",
    "sinks": "has sinks beside its keys",
    "indices": "looks at chosen keys only",
    "block_indices": "looks at chosen keys only",
}
"""Arguments by which something beside queries and keys decides a row of attention, and what it is."""

ROUNDING = 1e-6
"""Two scales that differ by less, relatively, are one: a scale may have passed through float32."""


@dataclass(frozen=True)
class LogitRule:
    """How one layer makes logits."""

    scale: float
    """Products of queries and keys are multiplied by this."""
    logits: AttentionLogits
    """What happens to them then."""


def read_logit_rule(dim: int, arguments: Mapping[str, Any], *, look_at_mask: bool = False) -> LogitRule:
    """Return the rule of one attention call.

    Args:
        dim: width of a query.
        arguments: of the call, beside module, queries, keys and values, by name.
        look_at_mask: also look for a bias in the values of the mask, for which a GPU is waited.
    """
    unfollowed = [reason for name, reason in ADDED.items() if arguments.get(name) is not None]
    scale = arguments.get("scaling")
    if isinstance(scale, Tensor):
        unfollowed.append("has a scale that is a tensor")
        scale = None
    if look_at_mask and _holds_bias(arguments.get("attention_mask")):
        unfollowed.append("adds a bias to its logits")
    cap = arguments.get("softcap")
    return LogitRule(
        dim**-0.5 if scale is None else float(scale),
        AttentionLogits(float(cap) if cap else None, " and ".join(dict.fromkeys(unfollowed))),
    )


def _holds_bias(mask: Any) -> bool:
    """Return whether a mask adds other numbers than 0 to logits that count.

    Fake tensors have no values; of them a mask that differs between heads is taken for one with a bias.
    """
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return False
    if mask.is_meta or isinstance(mask, FakeTensor):
        return mask.dim() == 4 and mask.shape[1] > 1
    counts = mask > torch.finfo(mask.dtype).min / 2
    return bool((counts & (mask != 0)).any())


def common_logits(rules: Sequence[LogitRule]) -> AttentionLogits:
    """Return what all layers do to their logits; layers with different soft caps cannot be followed."""
    unfollowed = dict.fromkeys(rule.logits.unfollowed for rule in rules if rule.logits.unfollowed)
    caps = {rule.logits.softcap for rule in rules}
    if len(caps) > 1:
        unfollowed["caps its logits differently from layer to layer"] = None
    return AttentionLogits(next(iter(caps)) if len(caps) == 1 else None, " and ".join(unfollowed))


def fold_scale(
    queries: Float[Tensor, "batch layer qhead time dim"], rules: Sequence[LogitRule]
) -> Float[Tensor, "batch layer qhead time dim"]:
    """Multiply each layer's queries so that ``q · k / √dim`` has the layer's own scale.

    Queries of layers that divide by √dim anyway are returned as they are; others in float32 at least.
    """
    root = math.sqrt(queries.shape[-1])
    factors = [rule.scale * root for rule in rules]
    if all(math.isclose(factor, 1, rel_tol=ROUNDING) for factor in factors):
        return queries
    if len(set(factors)) == 1:
        return widen(queries) * factors[0]
    of_layer = torch.tensor(factors, dtype=widen(queries[:0]).dtype, device=queries.device)
    return widen(queries) * of_layer[:, None, None, None]
