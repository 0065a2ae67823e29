"""Define what one forward pass of the student gives to the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kava_core.console import tell_once
from kava_core.data.encoding.encode import NO_LABEL
from kava_core.kv.capture.attention_layers import without_adapters
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.values import NO_FUSER_INPUTS, FuserInputs
from kava_core.latent.tokens import LatentTokens
from kava_core.protocols.axes import Cache
from kava_core.specfile.sections.latent import LatentSpec
from kava_core.specfile.sections.losses import CodiSpec


def cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"], items: Tensor
) -> Float[Tensor, ""]:
    """Return the summed next-token cross-entropy of the labelled positions, divided by ``items``.

    In float32, in nats.
    """
    # Labels are shifted, not logits: a slice of these would be copied, and so would its gradient.
    following = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), following, ignore_index=NO_LABEL, reduction="sum")
    return total / items


AUX_LOSS = "aux_loss"
"""Name of the term that a mixture of experts balances its experts by, as in transformers."""


def aux_loss(outputs: Any, labels: Int[Tensor, "batch time"], items: Tensor) -> Float[Tensor, ""] | None:
    """Return the load-balancing loss that a mixture of experts adds to its own loss; None if it has none.

    It is a mean over a forward pass; passes of one step are weighted by their labelled tokens, as
    cross-entropy is.

    Args:
        outputs: transformers' outputs; ``aux_loss`` is there where ``output_router_logits`` is set.
        labels: of this forward pass.
        items: labelled tokens of the whole batch.

    Source: Switch Transformers (arXiv 2101.03961), equation 4, as transformers computes it.
    """
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    return loss.float() * labels[:, 1:].ne(NO_LABEL).sum() / items


def aux_loss_weight(model: nn.Module) -> float:
    """Return by what transformers multiplies a model's router loss in its own loss.

    0 if neither model nor config names it, which is told once.

    Args:
        model: possibly with adapters.
    """
    causal: Any = without_adapters(model)
    for owner in (causal, causal.config.get_text_config()):
        for name in ("router_aux_loss_coef", "moe_loss_weight"):
            if isinstance(getattr(owner, name, None), float | int):
                return float(getattr(owner, name))
    tell_once(
        f"student: {type(causal).__name__} has a router loss whose weight its config does not name: it is "
        "measured ('aux_loss') and not trained on"
    )
    return 0.0


@dataclass(frozen=True)
class StudentPass:
    """What one forward pass of the student gave."""

    logits: Float[Tensor, "batch time vocab"]
    cross_entropy: Float[Tensor, ""]
    """Of the labelled tokens, divided by their number in the whole batch."""
    cache: Cache = field(default_factory=Cache)
    """Of the compared layers and positions; no part if no cache is compared."""
    rotation: Rotation | None = None
    """Of this pass, if targets are rotated like it."""
    fuser_inputs: FuserInputs = NO_FUSER_INPUTS
    answer_boundary: Float[Tensor, "layer batch hidden"] | None = None
    """With CODI's term: all layers' states at the token before the answer."""
    hidden_states: Cache | None = None
    """With the term of hidden states: the compared layers', ``batch layer 1 time hidden``."""
    latent_writer_logits: Float[Tensor, "batch _ vocab"] | None = None
    """With a cross-entropy on the written steps: the logits where latent tokens are written."""
    aux_loss: Float[Tensor, ""] | None = None
    """Of a mixture of experts whose config asks for it: see ``aux_loss``."""


@dataclass(frozen=True)
class LatentSetup:
    """Latent tokens in place of written steps, and what is compared of them beside keys and values."""

    tokens: LatentTokens
    spec: LatentSpec
    codi: CodiSpec | None = None
    reading_weight: float = 0.0
    """Weight of the cross-entropy of what the student reads as its own teacher."""
