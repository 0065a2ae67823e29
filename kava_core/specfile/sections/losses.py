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


class TeachersTerm(WeightedTerm):
    """Base of a term that several teachers share."""

    teachers: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Names of the teachers that take part; default: all of them."""
    teacher_weights: dict[Name, Annotated[float, Field(gt=0)]] = Field(default={})
    """How much each teacher counts, by name; one that is not named counts 1. They are divided by their sum
    over the teachers that ran. Example: ``{big: 2}``."""


class CrossLogitsSpec(TeachersTerm):
    """A loss on logits across tokenizers: next-token distributions against teachers' of any vocabulary.

    It is used beside other terms or alone. Each of these teachers runs to the end, its language-model head
    included. Special tokens, padding and tokens without a partner do not count. The term is summed over pairs
    and divided by the number of labelled tokens. Example: ``{form: spans, weight: 0.5}``.
    """

    form: Literal["spans", "sorted"] = "spans"
    """What is compared. ``sorted`` (ULD, arXiv 2402.12030): the completions' first tokens, their second ones
    and so on, each by the L1 distance of the sorted probabilities. ``spans`` (after TRL's GOLD): the tokens
    of both sides that cover the same characters, whose probabilities are multiplied by the chain rule;
    entries of the same text by a Kullback–Leibler divergence, the others by the sorted distance."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions; above 1 they are softer. The term is multiplied by its square."""


class HiddenSpec(TeachersTerm):
    """A loss on hidden states: the output of the student's layers against that of teachers' layers.

    A hidden state is aligned as a cache of one head: layers, time and width go through the teacher's
    ``align`` section, ``direction`` included. Each of these teachers runs to its last layer. The term is a
    mean over the student's tokens and layers. Example: ``{compare: cosine, weight: 0.5}``.
    """

    compare: Literal["mse", "cosine"] = "mse"
    """``mse``: the mean over the width of (student − target)², in units of the target's variance in the layer
    and example; ``cosine``: 1 − the cosine of the two states."""
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | Literal["all"] = "all"
    """Student layers that are compared, counted from 0 (negative: from the last)."""


class CodiSpec(WeightedTerm):
    """CODI's loss (arXiv 2502.21074): the student's hidden states at the token before the answer against a
    teacher's, in all layers.

    It is a smooth L1 divided by the teacher's standard deviation in the layer, over the examples of one
    forward pass. The term is a mean over examples and layers.
    """

    teacher: Name | None = None
    """Name of the teacher whose hidden states are used, a model as deep and as wide as the student; default:
    the only teacher."""
