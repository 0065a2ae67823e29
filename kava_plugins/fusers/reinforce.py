"""Learn from reward which teacher to run: one is drawn for a pass, and the student's gain is its reward."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import ReinforceConfig
from kava_plugins.fusers._routing import entropy_terms


class Reinforce(nn.Module):
    """A bandit over teachers, learning by REINFORCE (Williams 1992) with a running mean as baseline.

    In training each forward pass draws one teacher from ``softmax(logits)`` for all its examples, and only
    that one runs. The reward of the choice is known one pass later: by how much the student's cross-entropy
    fell. In evaluation all teachers are weighed with their probabilities.
    """

    needs_targets = False
    loss_before: Float[Tensor, ""]
    baseline: Float[Tensor, ""]
    advantage: Float[Tensor, ""]
    drawn: Int[Tensor, ""]
    before: Int[Tensor, ""]
    judged: Int[Tensor, ""]
    passes: Int[Tensor, ""]

    def __init__(self, config: ReinforceConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.entropy, self.momentum = config.entropy, config.momentum
        self.learning_rate = config.learning_rate
        self.logits = nn.Parameter(torch.zeros(len(teachers)))
        for name in ("loss_before", "baseline", "advantage"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("drawn", "before", "judged", "passes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def choose(self) -> Bool[Tensor, " teacher"]:
        """Choose the one teacher that is to run, by drawing from the policy; all of them in evaluation."""
        if not self.training or self.logits.is_meta:
            return torch.ones_like(self.logits, dtype=torch.bool)
        self.drawn.copy_(torch.multinomial(self.logits.softmax(0), 1)[0])
        return torch.arange(len(self.logits), device=self.logits.device) == self.drawn

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return the probabilities in evaluation, 1 for the drawn teacher in training; constant elsewhere."""
        teacher, batch, time = context.valid.shape
        weights = self.logits.softmax(0).detach()
        if self.training:
            weights = (torch.arange(teacher, device=weights.device) == self.drawn).to(weights)
        return weights[:, None, None, None].expand(teacher, batch, context.student.any.shape[1], time)

    @torch.no_grad()
    def reward(self, value: Float[Tensor, ""]) -> None:
        """Judge the choice before the present one by the fall of the cross-entropy to ``value``."""
        gain = torch.where(self.passes > 0, self.loss_before - value, 0)
        usual_gain = torch.where(self.passes > 1, self.baseline, gain)
        self.advantage.copy_(gain - usual_gain)
        self.baseline.copy_(self.momentum * usual_gain + (1 - self.momentum) * gain)
        self.judged.copy_(self.before)
        self.before.copy_(self.drawn)
        self.loss_before.copy_(value)
        self.passes += 1

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """Return positions × (−advantage · log π(judged) − ``entropy`` · H(π)).

        Source: Williams 1992, with a running mean as baseline.
        """
        log_chances = self.logits.log_softmax(0)
        # Copies, because the next reward changes both before the backward pass needs them.
        log_chance_of_judged = log_chances.gather(0, self.judged.clone()[None])[0]
        policy_entropy = entropy_terms(log_chances.exp()).sum()
        policy_loss = -self.advantage.clone() * log_chance_of_judged - self.entropy * policy_entropy
        positions = weights.detach().sum(0).mean(1).sum()
        return policy_loss * positions
