"""Say how a model's attention makes logits of captured queries and keys, as far as a product does not."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.errors import SpecError


@dataclass(frozen=True)
class AttentionLogits:
    """What attention does to ``q · k / √dim`` before its softmax, for captured queries and keys.

    Queries are captured with the model's own scale in them, so for most models this is nothing.
    """

    softcap: float | None = None
    """Logits x become ``softcap · tanh(x / softcap)``; None: they are not capped."""
    unfollowed: str = ""
    """What else enters the softmax, for example ``adds a bias to its logits``; empty: nothing."""

    def require_followed(self, who: str, *, softcap: bool) -> None:
        """Check that a component can compute this attention from queries and keys.

        Args:
            who: the component and whose attention it is, for the error.
            softcap: whether the component applies soft caps.

        Raises:
            SpecError: it cannot.
        """
        obstacle = self.unfollowed
        if self.softcap is not None and not softcap:
            obstacle = f"caps its logits at {self.softcap:g} (softcap)"
        if obstacle:
            raise SpecError(
                f"{who}: attention {obstacle}, which cannot be computed from queries and keys here; "
                "use a loss that computes no such attention, for example mercator or relation"
            )

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f"attention logits capped at {self.softcap:g}"
        other = f"attention {self.unfollowed}" if self.unfollowed else ""
        return ", ".join(filter(None, (cap, other)))


PRODUCTS = AttentionLogits()
"""Logits are ``q · k / √dim`` and nothing else."""
