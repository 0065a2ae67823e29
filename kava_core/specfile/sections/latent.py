"""Describe the latent tokens that stand in place of written steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


class CurriculumSpec(Strict):
    """In stage k the student writes its first k steps as latent tokens, the others as text."""

    steps: Positive
    """Optimizer steps in a stage. The first stage is all text; the run must be long enough to reach the last,
    with all latent tokens."""
    tokens: Positive = 1
    """Latent tokens for a written step."""


class LatentSpec(Strict):
    """With ``trajectory: latent``: continuous tokens that the student writes to itself between prompt and
    answer, refined in Jacobi passes (PCCoT, arXiv 2506.18582; KaVa, arXiv 2510.02312)."""

    count: int = Field(6, ge=0)
    """Latent tokens. 0: the answer at once, the baseline without any reasoning."""
    passes: int = Field(3, ge=0)
    """Jacobi passes. ``count`` of them are sequential writing; 0: only learned embeddings, like pause
    tokens."""
    projection: Literal["none", "linear", "mlp"] = "mlp"
    """From the last hidden state at a place to the input of the next one."""
    begin: bool = True
    """Put a token ``<bot>`` before the latent ones, as KaVa does. Without it the first of them is written
    from the prompt's last token, which a model that has learnt written steps knows how to go on from."""
    step_cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the written steps' tokens at the latent ones, as in LOTUS: token i of
    the trace is to be read from where latent token i is written. A trace longer than the latent tokens is
    thinned evenly, a shorter one has labels at the first of them alone."""
    curriculum: CurriculumSpec | None = None
    """From written steps to latent tokens in stages (Coconut, arXiv 2412.06769); null: latent from the
    first step on."""

    @model_validator(mode="after")
    def _stages_reach_all(self) -> LatentSpec:
        if self.curriculum is not None and self.count % self.curriculum.tokens:
            raise ValueError(
                f"'curriculum.tokens': {self.count} latent tokens cannot be divided among steps of "
                f"{self.curriculum.tokens}"
            )
        return self
