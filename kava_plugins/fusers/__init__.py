"""Declare the built-in fusers: how much each teacher counts, where and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig

Weights = dict[str, Annotated[float, Field(ge=0)]]


def _check_some_weight(weights: Weights | None) -> Weights | None:
    if weights is not None and not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return weights


SomeWeights = Annotated[Weights | None, AfterValidator(_check_some_weight)]


class FixedConfig(ComponentConfig):
    """Give every teacher a constant weight, the same everywhere.

    Formula: ``w[teacher, batch, layer, time] = weights[teacher]``.

    Source: Hinton et al. 2015, arXiv 1503.02531 (averages of several teachers).
    """

    name: Literal["fixed"] = "fixed"
    component = "kava_plugins.fusers.fixed:Fixed"

    weights: SomeWeights = None
    """Teacher's name to weight, one for every teacher; none: all teachers count alike."""
    sample: int | None = Field(None, gt=0)
    """In each forward pass of training draw this many teachers, in proportion to their weights; the others
    do not run."""


class SimilarityConfig(ComponentConfig):
    """Weigh teachers by the cosine between the student's cache and each teacher's mean cache.

    Formula: ``w = softmax over teachers of cos(q[layer, time], p[teacher, layer]) / temperature``; q is the
    student's cache, p the mean of a teacher's aligned cache over the calibration examples.

    Source: kava's own.
    """

    name: Literal["similarity"] = "similarity"
    component = "kava_plugins.fusers.similarity:Similarity"

    temperature: float = Field(0.1, gt=0)
    """Cosines are divided by this: the smaller, the harder the choice."""
    per: Literal["token", "example"] = "token"
    """Weights for every position, or for an example as a whole."""


class _RouterConfig(ComponentConfig):
    """Parameters that all trained routers share."""

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
    """Weigh teachers by a small network that reads the student's hidden state.

    Formula: ``w = softmax over teachers of (W₂ · SiLU(W₁ · h[time] + b₁) + b₂) / temperature``; h is the
    student's last hidden state.

    Source: Shazeer et al. 2017, arXiv 1701.06538 (gating networks of mixtures of experts).
    """

    name: Literal["learnable"] = "learnable"
    component = "kava_plugins.fusers.learnable:Learnable"

    per: Literal["token", "example"] = "token"
    """Weights for every position, or for an example as a whole."""
    per_layer: bool = False
    """Weights for every student layer instead of one for all."""
    temperature: float = Field(1.0, gt=0)
    """Scores are divided by this."""


class AttentionConfig(_RouterConfig):
    """Weigh teachers by an attention query of the student over the teachers' caches.

    Formula: ``w = softmax over teachers of (W_q · h[time]) · (W_k · c[teacher, layer, time]) / √width``; h is
    the student's last hidden state, c a teacher's aligned cache.

    Source: Vaswani et al. 2017, arXiv 1706.03762 (scaled dot-product attention; here its keys are teachers).
    """

    name: Literal["attention"] = "attention"
    component = "kava_plugins.fusers.attention:Attention"


class TaskConfig(ComponentConfig):
    """Give every teacher a constant weight for each task label of the data.

    Formula: ``w[teacher, batch, layer, time] = weights[task of the example][teacher]``.

    An example's label is its field ``task``.

    Source: kava's own.
    """

    name: Literal["task"] = "task"
    component = "kava_plugins.fusers.task:Task"

    weights: dict[str, Annotated[Weights, AfterValidator(_check_some_weight)]] = Field(min_length=1)
    """Label to weights of all teachers, such as ``{math: {a: 1, b: 0}}``."""
    default: SomeWeights = None
    """Weights for an example without label or with another one; none: all teachers count alike."""


class ReinforceConfig(ComponentConfig):
    """Draw one teacher for each pass from a policy, rewarded by the fall of the student's cross-entropy.

    Formula: ``loss = −(r − mean r) · log π[drawn] − entropy · H(π)`` with ``π = softmax(logits)`` and the
    reward ``r = CE of the pass − CE of the next pass``.

    Source: Williams 1992 (REINFORCE); for a choice of teachers: Yuan et al. 2021, arXiv 2012.06048.
    """

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
