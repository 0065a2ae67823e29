"""Define latent tokens: continuous inputs that a model writes to itself and refines by Jacobi passes.

The input of a slot is a projection of the model's last hidden state at the position before it. All slots are
computed at once from the slots of the pass before. After as many passes as slots nothing changes any more, as
if they had been written one after another.

Source: parallel continuous chain of thought (PCCoT, arXiv 2506.18582), as KaVa uses it (arXiv 2510.02312,
section 3). Written one after another: Coconut (arXiv 2412.06769), CODI (arXiv 2502.21074).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.latent.growing_text import GrowingText

Projection = Literal["none", "linear", "mlp"]


class LatentTokens(nn.Module):
    """What a model needs beside its own weights to reason in latent tokens.

    Args:
        count: how many latent tokens (M).
        passes: Jacobi passes (T). ``count`` of them are sequential writing; with 0 the slots' own embeddings
            are the inputs, like pause tokens (arXiv 2310.02226).
        hidden: the model's width.
        projection: from hidden states to inputs. ``mlp``: two layers with GELU, twice as wide inside.
        begin: whether the token BEGIN comes before them.

    A slot's input is its own embedding plus the projected hidden state; embeddings start small, so that the
    slots begin unlike one another. Only the first ``active`` slots are used: a curriculum begins with none.
    """

    active: int

    def __init__(
        self, count: int, passes: int, hidden: int, projection: Projection = "mlp", *, begin: bool = True
    ) -> None:
        super().__init__()
        self.count, self.passes, self.kind, self.begin = count, passes, projection, begin
        self.active = count
        self.slots = nn.Parameter(torch.randn(count, hidden) * 0.02)
        self.projection = _projection(projection if count and passes else "none", hidden)

    def forward(
        self,
        model: nn.Module,
        prefix: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"],
        read: GrowingText | None = None,
    ) -> Float[Tensor, "batch _ hidden"]:
        """Return the refined inputs of the active slots, with gradients through all passes.

        After pass t the first t slots are final: they and the prefix are not read again. Nor are slots that
        no later pass would look at: T − t passes before the end, that many slots less are read. Mask and
        positions are given in every pass, so an example alone gives what it gives in a batch.

        Args:
            model: a causal language model of transformers, possibly with adapters.
            prefix: input embeddings of what comes before the slots, padded on the left.
            mask: its real positions.
            read: reads the text, and keeps what is final; None: a new reader.
        """
        slots = self.slots[: self.active]
        inputs = slots.to(prefix.dtype).expand(len(prefix), -1, -1)
        read, begin = read or GrowingText(model), prefix.shape[1]
        for number in range(self.rounds):
            wanted = self.active - self.rounds + number
            text = torch.cat([prefix, inputs[:, :wanted]], 1)
            hidden = read(text, extend_mask(mask, wanted), final=begin + number)[:, number - wanted - 1 :]
            later = slots[number : wanted + 1] + self.projection(hidden.to(slots.dtype))
            inputs = torch.cat([inputs[:, :number], later.to(prefix.dtype), inputs[:, wanted + 1 :]], 1)
        return inputs + self._idle() if self.active < self.count else inputs

    @property
    def rounds(self) -> int:
        """Return the number of Jacobi passes taken: more than there are slots would change nothing."""
        return min(self.passes, self.active)

    def _idle(self) -> Tensor:
        """Return 0, attached to every weight: several processes wait for the gradients of all."""
        return torch.stack([0 * p.sum() for p in self.parameters()]).sum()


def _projection(kind: Projection, hidden: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(hidden, hidden)
    return nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))


def extend_mask(mask: Bool[Tensor, "batch time"], count: int) -> Bool[Tensor, "batch _"]:
    """Return the mask with ``count`` more real positions at the end."""
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)
