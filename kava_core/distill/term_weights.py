"""Keep the weights of the terms that compare no caches; ``KVPipeline`` keeps those of KV losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import WeightedTerm
from kava_core.distill.terms import Term
from kava_core.kv.compare.weights import schedule_factor


class TermWeights(nn.Module):
    """λ of every such term, as it is at this point of the run.

    They are part of a checkpoint only if one was measured before the first step (``share``): the others
    are in the spec.

    Args:
        declared: the declaration of every term, by its name.
    """

    weights: Tensor

    def __init__(self, declared: Mapping[str, WeightedTerm]) -> None:
        super().__init__()
        self.declared = dict(declared)
        self.progress = 0.0
        """How far the run is, from 0 to 1; schedules go by it."""
        first_weights = [term.weight for term in self.declared.values()]
        measured = any(term.share is not None for term in self.declared.values())
        self.register_buffer("weights", torch.tensor(first_weights, dtype=torch.float64), persistent=measured)

    def current(self) -> dict[str, Float[Tensor, ""]]:
        """Return λ of every term, by its name."""
        factors = (schedule_factor(term, self.progress) for term in self.declared.values())
        weights = zip(self.declared, self.weights.unbind(), factors, strict=True)
        return {name: weight * factor for name, weight, factor in weights}

    def weigh(self, name: str, value: Float[Tensor, ""]) -> Term:
        """Return a value as a term with its current weight."""
        return Term(name, self.current()[name].to(value.dtype), value)
