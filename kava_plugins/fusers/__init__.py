"""Built-in fusers: how much each teacher counts, where and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig

Weights = dict[str, Annotated[float, Field(ge=0)]]


def _some_weight(weights: Weights | None) -> Weights | None:
    if weights is not None and not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return weights


SomeWeights = Annotated[Weights | None, AfterValidator(_some_weight)]


class FixedConfig(ComponentConfig):
    """Constant weights, the same everywhere."""

    name: Literal["fixed"] = "fixed"
    component = "kava_plugins.fusers.fixed:Fixed"

    weights: SomeWeights = None
    """Teacher's name to weight, one for every teacher; none: all teachers count alike."""
    sample: int | None = Field(None, gt=0)
    """In each forward pass of training draw this many teachers, in proportion to their weights; the others
    do not run."""


class SimilarityConfig(ComponentConfig):
    """Softmax of the cosine between the student's cache and each teacher's mean cache."""

    name: Literal["similarity"] = "similarity"
    component = "kava_plugins.fusers.similarity:Similarity"

    temperature: float = Field(0.1, gt=0)
    """Cosines are divided by this: the smaller, the harder the choice."""
    per: Literal["token", "example"] = "token"
    """Weights for every position, or for an example as a whole."""


class _RouterConfig(ComponentConfig):
    """What trained routers share."""

    name: str
    entropy: float = Field(0.0, ge=0)
    """Weight of −entropy in the loss: above 0 keeps the router undecided."""
    balance: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss: above 0 makes all teachers used alike over a batch."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the router; none: ``train.learning_rate``."""
    width: int = Field(64, gt=0)
    """Inner width."""


class LearnableConfig(_RouterConfig):
    """A network on the student's hidden state gives each teacher's weight (MLP, one inner layer)."""

    name: Literal["learnable"] = "learnable"
    component = "kava_plugins.fusers.learnable:Learnable"

    per: Literal["token", "example"] = "token"
    """Weights for every position, or for an example as a whole."""
    per_layer: bool = False
    """Weights for every student layer instead of one for all."""
    temperature: float = Field(1.0, gt=0)
    """Scores are divided by this."""


class AttentionConfig(_RouterConfig):
    """The student's query attends over the teachers' caches at each position and layer."""

    name: Literal["attention"] = "attention"
    component = "kava_plugins.fusers.attention:Attention"


class TaskConfig(ComponentConfig):
    """Constant weights for each task label of the data (field ``task`` of an example)."""

    name: Literal["task"] = "task"
    component = "kava_plugins.fusers.task:Task"

    weights: dict[str, Annotated[Weights, AfterValidator(_some_weight)]] = Field(min_length=1)
    """Label to weights of all teachers, such as ``{math: {a: 1, b: 0}}``."""
    default: SomeWeights = None
    """Weights for an example without label or with another one; none: all teachers count alike."""


class ReinforceConfig(ComponentConfig):
    """A policy over teachers, rewarded by the fall of the student's cross-entropy (REINFORCE)."""

    name: Literal["reinforce"] = "reinforce"
    component = "kava_plugins.fusers.reinforce:Reinforce"

    entropy: float = Field(0.01, ge=0)
    """Weight of the policy's entropy: above 0 keeps it exploring."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the running mean of rewards that serves as baseline."""
    learning_rate: float | None = Field(0.05, gt=0)
    """Learning rate of the policy."""


@hookimpl
def kava_fusers() -> Sequence[type[ComponentConfig]]:
    """Register this package's fusers."""
    return [FixedConfig, SimilarityConfig, LearnableConfig, AttentionConfig, TaskConfig, ReinforceConfig]
