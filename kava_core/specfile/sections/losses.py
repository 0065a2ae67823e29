"""Describe the loss terms that compare logits or hidden states."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kava_core.config import Strict
from kava_core.specfile.sections.compare import Name

DivergenceKind = Literal["forward", "reverse", "jeffreys"]


class LogitsSpec(Strict):
    """Beside KV losses: the student's next-token distribution against that of teachers with its vocabulary.

    Each such teacher runs to the end then, its language-model head included. Positions count where both
    completions agree so far, the prompts may differ.
    """

    weight: float = Field(1.0, ge=0)
    """The term is multiplied by this and added to cross-entropy; it is a mean over labelled tokens and
    teachers."""
    temperature: float = Field(1.0, gt=0)
    """Both distributions are softened by it; the term is multiplied by its square."""
    kind: DivergenceKind = "forward"
    """``forward``: KL(teacher ‖ student); ``reverse``: KL(student ‖ teacher); ``jeffreys``: their sum."""
    teachers: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Names of the teachers; default: all."""


class CodiSpec(Strict):
    """CODI's term (arXiv 2502.21074): the hidden states of all layers at the token before the answer are
    drawn to a teacher's, by smooth L1 divided by the teacher's standard deviation in the layer, over the
    examples of one forward pass."""

    weight: float = Field(1.0, ge=0)
    """The term is multiplied by this and added to cross-entropy; it is a mean over examples and layers."""
    teacher: Name | None = None
    """Whose hidden states, of a model as deep and as wide as the student; default: the only teacher."""
