"""Define the addends of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One addend of the loss beside cross-entropy: weight × value."""

    name: str
    weight: float | Float[Tensor, ""]
    value: Float[Tensor, ""]
    """A mean over what the term is about, in the whole batch; without the weight."""


@dataclass(frozen=True)
class KVTerms:
    """The KV losses of one forward pass."""

    total: Float[Tensor, ""]
    """Σ λ · term with gradient, and what the fuser adds."""
    values: dict[str, Float[Tensor, ""]]
    """Every term by name, without its weight."""


def total_loss(cross_entropy: Tensor, kv_terms: KVTerms, others: Sequence[Term]) -> Float[Tensor, ""]:
    """Return the loss that is differentiated: cross-entropy + the KV losses + Σ weight · other term."""
    total = kv_terms.total
    if others:
        total = total + sum(term.weight * term.value for term in others)
    return cross_entropy + total


def metrics_of_step(
    loss: Tensor, cross_entropy: Tensor, kv_terms: KVTerms, others: Sequence[Term]
) -> dict[str, Tensor]:
    """Return what is logged of a forward pass, by name.

    ``loss`` has a gradient; ``ce`` (cross-entropy) and every unweighted term are detached.
    """
    values = kv_terms.values | {term.name: term.value for term in others}
    detached = {name: torch.detach(value) for name, value in values.items()}
    return {"loss": loss, "ce": cross_entropy.detach(), **detached}
