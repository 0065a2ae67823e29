"""Describe the latent tokens that replace written steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kava_core.config import Strict
from kava_core.specfile.sections.types import Positive


class CurriculumSpec(Strict):
    """Stages from written steps to latent tokens: in stage k the student writes its first k steps as latent
    tokens and the others as text. Example: ``{steps: 500, tokens: 2}``."""

    steps: Positive
    """Optimizer steps in a stage. The first stage is all text; ``train.steps`` must be enough to reach the
    last, in which all latent tokens are used."""
    tokens: Positive = 1
    """Number of latent tokens that replace a written step."""


class LatentSpec(Strict):
    """Latent tokens: continuous vectors that the student writes to itself between prompt and answer.

    Used with ``trajectory: latent``. They are refined in Jacobi passes (PCCoT, arXiv 2506.18582; KaVa,
    arXiv 2510.02312). Example: ``{count: 24, passes: 3}``.
    """

    count: int = Field(6, ge=0)
    """Number of latent tokens. 0: the student answers at once, the baseline without any reasoning."""
    passes: int = Field(3, ge=0)
    """Number of Jacobi passes. As many as ``count`` amount to writing one token after the other; 0: learned
    embeddings alone, like pause tokens."""
    projection: Literal["none", "linear", "mlp"] = "mlp"
    """What maps the last hidden state at one latent token to the input of the next: nothing, a matrix, or two
    with a nonlinearity between."""
    begin: bool = True
    """Put a token ``<bot>`` before the latent ones, as KaVa does. Without it the first latent token is
    written from the prompt's last token, from which a model that has learnt written steps can go on."""
    step_cross_entropy: float = Field(0.0, ge=0)
    """Weight of a cross-entropy of the written steps' tokens at the latent ones, as in LOTUS: token i of the
    steps is predicted where latent token i is written. If there are more tokens than latent ones, they are
    thinned evenly; if there are fewer, the first latent tokens alone have labels."""
    curriculum: CurriculumSpec | None = None
    """Go from written steps to latent tokens in stages (Coconut, arXiv 2412.06769); null: all latent tokens
    from the first step on."""

    @model_validator(mode="after")
    def _stages_reach_all(self) -> LatentSpec:
        if self.curriculum is not None and self.count % self.curriculum.tokens:
            raise ValueError(
                f"'curriculum.tokens': {self.count} latent tokens cannot be divided among steps of "
                f"{self.curriculum.tokens}"
            )
        return self
