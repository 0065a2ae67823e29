"""Describe the loss terms that compare logits or hidden states."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kava_core.config import WeightedTerm
from kava_core.specfile.sections.compare import Name

DivergenceKind = Literal["forward", "reverse", "jeffreys"]


class LogitsSpec(WeightedTerm):
    """A loss on logits: the student's next-token distribution against that of teachers with its vocabulary.

    It is used beside KV losses or alone. Each of these teachers runs to the end, its language-model head
    included. A position counts if both completions are equal up to it; the prompts may differ. The term is a
    mean over labelled tokens and teachers. Example: ``{weight: 0.5, temperature: 2}``.
    """

    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions; above 1 they are softer. The term is multiplied by its square."""
    kind: DivergenceKind = "forward"
    """Which divergence. ``forward``: KL(teacher ‖ student); ``reverse``: KL(student ‖ teacher); ``jeffreys``:
    their sum."""
    teachers: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Names of the teachers whose logits are distilled; default: all of them."""


class CodiSpec(WeightedTerm):
    """CODI's loss (arXiv 2502.21074): the student's hidden states at the token before the answer against a
    teacher's, in all layers.

    It is a smooth L1 divided by the teacher's standard deviation in the layer, over the examples of one
    forward pass. The term is a mean over examples and layers.
    """

    teacher: Name | None = None
    """Name of the teacher whose hidden states are used, a model as deep and as wide as the student; default:
    the only teacher."""
