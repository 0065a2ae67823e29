"""Count what the terms of a loss are divided by, and among whom they are divided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.data.encoding.encode import NO_LABEL
from kava_core.specfile.sections.losses import TeachersTerm

LABELLED, TOKENS, EXAMPLES, READ = range(4)
"""Places in the counts: the student's labelled tokens, its real positions, examples, and the labelled tokens
that the student reads as its own teacher."""


def loss_denominators(
    student: Mapping[str, Tensor], teachers: Mapping[str, Mapping[str, Any]], own: str | None = None
) -> Float[Tensor, "4"]:
    """Count the denominators of one batch, indexed by ``LABELLED``, ``TOKENS``, ``EXAMPLES`` and ``READ``.

    Args:
        student: the student's side of the batch.
        teachers: every teacher's side, by name.
        own: name of the teacher that is the student itself; None: there is none, and ``READ`` is 0.
    """
    read = _labelled(teachers[own]) if own is not None else student["labels"].new_zeros(())
    examples = torch.as_tensor(len(student["labels"]), device=read.device)
    return torch.stack([_labelled(student), student["attention_mask"].sum(), examples, read]).float()


def _labelled(side: Mapping[str, Any]) -> Tensor:
    count: Tensor = side["labels"][:, 1:].ne(NO_LABEL).sum()
    return count


def teacher_shares(term: TeachersTerm, ran: Iterable[str]) -> dict[str, float]:
    """Return the share of every teacher of a term that ran, by its name; they sum to 1.

    Args:
        term: names its teachers and their weights.
        ran: names of the teachers that ran in this forward pass, of other terms' too.
    """
    weights = {}
    for name in ran:
        if term.teachers is None or name in term.teachers:
            weights[name] = term.teacher_weights.get(name, 1.0)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
