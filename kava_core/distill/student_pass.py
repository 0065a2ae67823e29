"""Define what one forward pass of the student gives to the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kava_core.data.encoding.encode import NO_LABEL
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
    latent_writer_logits: Float[Tensor, "batch _ vocab"] | None = None
    """With a cross-entropy on the written steps: the logits where latent tokens are written."""


@dataclass(frozen=True)
class LatentSetup:
    """Latent tokens in place of written steps, and what is compared of them beside keys and values."""

    tokens: LatentTokens
    spec: LatentSpec
    codi: CodiSpec | None = None
    reading_weight: float = 0.0
    """Weight of the cross-entropy of what the student reads as its own teacher."""
