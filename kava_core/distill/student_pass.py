"""Run the student once, and keep what the terms of the loss need of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kava_core.data.encode import NO_LABEL
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.values import FuserInputs
from kava_core.latent.tokens import LatentTokens
from kava_core.protocols.axes import Cache
from kava_core.specfile.sections.latent import LatentSpec
from kava_core.specfile.sections.losses import CodiSpec


def cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"], items: Tensor
) -> Float[Tensor, ""]:
    """Summed next-token cross-entropy of the labelled positions, divided by ``items``, in float32."""
    # Labels are shifted, not logits: a slice of these would be copied, and so would its gradient.
    following = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), following, ignore_index=NO_LABEL, reduction="sum")
    return total / items


@dataclass(frozen=True)
class StudentPass:
    """What one forward pass of the student gave."""

    logits: Float[Tensor, "batch time vocab"]
    ce: Float[Tensor, ""]
    cache: Cache
    rotation: Rotation | None
    beside: FuserInputs
    boundary_states: Float[Tensor, "layer batch hidden"] | None = None
    """With CODI's term: all layers' states at the token before the answer."""
    writers: Float[Tensor, "batch _ vocab"] | None = None
    """With latent tokens: the logits where they are written."""


@dataclass(frozen=True)
class LatentSetup:
    """Latent tokens in place of written steps, and what is compared of them beside keys and values."""

    tokens: LatentTokens
    spec: LatentSpec
    codi: CodiSpec | None = None
    reading: float = 0.0
    """Weight of the cross-entropy of what the student reads as its own teacher."""
