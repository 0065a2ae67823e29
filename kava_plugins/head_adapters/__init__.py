"""Declare the built-in head adapters: ``t_head → head``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class StructuredConfig(ComponentConfig):
    """Mix heads with heads: every student head is a weighted mean of teacher heads, for any two counts.

    Formula: ``y[layer, head, time, dim] = Σ_t_head A[head, t_head] · x[layer, t_head, time, dim]``; at first
    every row of A sums to 1.

    Source: Ainslie et al. 2023, arXiv 2305.13245 (GQA: heads averaged in groups).
    """

    name: Literal["structured"] = "structured"
    component = "kava_plugins.head_adapters.structured:Structured"

    init: Literal["grouped", "uniform", "random"] = "grouped"
    """``grouped``: neighbouring heads are averaged; ``uniform``: all heads are; ``random``: positive weights
    drawn with ``seed``."""
    per_layer: bool = False
    """One mix for each layer instead of one for all."""
    share_kv: bool = True
    """Keys and values are mixed alike. Queries always have their own mix."""
    trainable: bool = False
    """Train the mix with the student. A mix trained by the KV loss alone can absorb the mismatch."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the mix, with ``trainable``; null: ``train.learning_rate``."""
    seed: int = 0
    """Seed of ``random``."""


class FlatConfig(ComponentConfig):
    """Put all heads side by side as one wide head, on both sides: the baseline without structure.

    Formula: ``batch layer head time dim → batch layer 1 time (head · dim)``.

    Source: kava's own.
    """

    name: Literal["flat"] = "flat"
    component = "kava_plugins.head_adapters.flat:Flat"

    layers: bool = False
    """Put all compared layers side by side as well, as one layer with one head."""


@hookimpl
def kava_head_adapters() -> Sequence[type[ComponentConfig]]:
    """Register this package's head adapters."""
    return [StructuredConfig, FlatConfig]
