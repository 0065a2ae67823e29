"""Declare the built-in layer mappers: ``t_layer → layer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class RatioConfig(ComponentConfig):
    """Let every student layer read the teacher layer at the same relative depth.

    Formula: student layer i of L reads teacher layer ``round((i + 1) · T / L) − 1`` of T, counted from 0.

    Source: Jiao et al. 2020, arXiv 1909.10351 (TinyBERT: a uniform map of layers).
    """

    name: Literal["ratio"] = "ratio"
    component = "kava_plugins.layer_mappers.ratio:Ratio"

    sources: int = Field(1, gt=0)
    """How many neighbouring teacher layers each student layer averages."""


class LastAlignedConfig(ComponentConfig):
    """Let the last layers of both models meet, one by one.

    Formula: student layer i of L reads teacher layer ``T − L + i`` of T, counted from 0; 0 if that is less.

    Source: Sun et al. 2019, arXiv 1908.09355 (PKD-Last: the student learns from the last layers).
    """

    name: Literal["last_aligned"] = "last_aligned"
    component = "kava_plugins.layer_mappers.last_aligned:LastAligned"

    sources: int = Field(1, gt=0)
    """How many neighbouring teacher layers each student layer averages."""


class ChosenConfig(ComponentConfig):
    """Let every student layer read the teacher layers that the spec names.

    Formula: ``W[layer, t_layer] = 1 / n`` at the n teacher layers of the row, 0 elsewhere.

    Source: kava's own.
    """

    name: Literal["chosen"] = "chosen"
    component = "kava_plugins.layer_mappers.chosen:Chosen"

    layers: tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...] = Field(min_length=1)
    """For every student layer the teacher layers whose mean it reads, counted from 0, or from the end: -1 is
    the last. One row serves all student layers."""


class CkaConfig(ComponentConfig):
    """Let every student layer read the most similar teacher layers, by debiased linear CKA.

    Formula: ``CKA = Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L))``, sums over minibatches, with
    ``HSIC₁ = ⟨K, L⟩ / (n · (n − 3))`` of the U-centred Gram matrices K of a student layer's n rows and L of a
    teacher layer's; weights are ``softmax(CKA / temperature)`` over the ``top_k`` largest.

    It is measured on training examples, before the first step, unless ``map`` names what ``kava calibrate``
    measured.

    Source: Kornblith et al. 2019, arXiv 1905.00414 (CKA); Song et al. 2012 (the debiased estimate); Nguyen et
    al. 2021, arXiv 2010.15327 (its sums over minibatches).
    """

    name: Literal["cka"] = "cka"
    component = "kava_plugins.layer_mappers.cka:Cka"

    on: Literal["hidden", "keys", "values"] = "hidden"
    """What is compared: the layers' outputs (the last one normalised, as transformers returns it), or a part
    of the cache, without rotation."""
    skip: int = Field(1, ge=0)
    """Tokens left out at the start of every example. Activations of the first one are hundreds of times
    larger in many models (arXiv 2402.17762): it alone would decide the similarity."""
    top_k: int = Field(2, gt=0)
    """How many of the most similar teacher layers each student layer reads."""
    temperature: float = Field(0.1, gt=0)
    """Their weights are softmax(similarity / temperature)."""
    rows: int = Field(256, ge=4)
    """Tokens in a minibatch of the estimate. More see rarer differences and cost more memory."""
    map: str | None = None
    """The ``.safetensors`` file of a measurement; the ``.json`` beside it must still describe it. ``top_k``
    and ``temperature`` may differ from those it was measured with."""


class LearnedConfig(ComponentConfig):
    """Let every student layer read a mixture of all teacher layers, trained with the student.

    Formula: ``W[layer, t_layer] = softmax over t_layer of logits[layer, t_layer] / temperature``.

    A mixture trained only by the KV loss can absorb part of the mismatch, as a trained projector does.

    Source: Peters et al. 2018, arXiv 1802.05365 (ELMo: layers mixed by softmax weights).
    """

    name: Literal["learned"] = "learned"
    component = "kava_plugins.layer_mappers.learned:Learned"

    temperature: float = Field(1.0, gt=0)
    """The weights are softmax(logits / temperature): lower is sharper, also at the start."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the logits; default: that of the student."""


@hookimpl
def kava_layer_mappers() -> Sequence[type[ComponentConfig]]:
    """Register this package's layer mappers."""
    return [RatioConfig, LastAlignedConfig, ChosenConfig, CkaConfig, LearnedConfig]
