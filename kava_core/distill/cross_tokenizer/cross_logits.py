"""Compute the term of logits across tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.distill.cross_tokenizer.grouped_distance import Comparison, grouped_distance
from kava_core.distill.cross_tokenizer.shared_tokens import SharedTokens
from kava_core.distill.cross_tokenizer.token_groups import pair_by_characters, pair_by_order
from kava_core.distill.denominators import LABELLED, teacher_shares
from kava_core.models.teacher import TeacherPass
from kava_core.specfile.sections.losses import CrossLogitsSpec

CROSS_LOGITS = "cross_logits"
"""Name of the term."""

PAIRING = {"sorted": pair_by_order, "spans": pair_by_characters}
"""How each form of the term pairs tokens."""


class CrossLogits(nn.Module):
    """The term of logits across tokenizers, with what every teacher's vocabulary shares with the student's.

    Args:
        spec: form, temperature, and how much each teacher counts.
        vocabularies: of every teacher that takes part, by its name.
    """

    def __init__(self, spec: CrossLogitsSpec, vocabularies: Mapping[str, SharedTokens]) -> None:
        super().__init__()
        self.spec = spec
        self._place_of = {name: place for place, name in enumerate(vocabularies)}
        self._vocabularies = nn.ModuleList(vocabularies.values())

    def vocabularies_of(self, teacher: str) -> SharedTokens:
        """Return what a teacher's vocabulary shares with the student's."""
        vocabularies = self._vocabularies[self._place_of[teacher]]
        assert isinstance(vocabularies, SharedTokens)
        return vocabularies

    def forward(
        self,
        logits: Float[Tensor, "batch time vocab"],
        passes: Sequence[TeacherPass],
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]],
        denominators: Float[Tensor, "4"],
    ) -> Float[Tensor, ""]:
        """Return the distances, summed over pairs and divided by the labelled tokens of the whole batch.

        It is the weighted mean over the teachers that ran.

        Args:
            logits: the student's.
            passes: of the teachers that ran, with their logits.
            student: the student's side of the batch.
            teachers: every teacher's side, by name.
            denominators: of the whole batch.
        """
        logits_of = {given.teacher: given.logits for given in passes if given.logits is not None}
        addends = [torch.zeros_like(denominators[LABELLED])]
        for name, share in teacher_shares(self.spec, logits_of).items():
            comparison = Comparison(
                self.vocabularies_of(name), self.spec.form == "spans", self.spec.temperature
            )
            pairs = PAIRING[self.spec.form](student, teachers[name])
            distance = grouped_distance(logits, logits_of[name].to(logits.device), pairs, comparison)
            addends.append(distance * share / denominators[LABELLED])
        return torch.stack(addends).sum()
