"""Pair groups of the student's tokens with groups of a teacher's: by their order, or by their characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from kava_core.data.encoding.encode import NO_LABEL
from kava_core.protocols.timeline import PROMPT

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class TokenGroups(NamedTuple):
    """Groups of adjacent tokens of one side, one after another; on the CPU."""

    rows: Int[Tensor, " _"]
    """Where each token is predicted: ``example · time + position`` of the token before it."""
    tokens: Int[Tensor, " _"]
    """Numbers of the tokens."""
    starts: Int[Tensor, " _"]
    """Where each group begins, and the number of tokens at the end."""

    @property
    def sizes(self) -> Int[Tensor, " _"]:
        """Return how many tokens each group has."""
        return self.starts.diff()

    def part(self, first: int, stop: int) -> TokenGroups:
        """Return the groups from ``first`` until before ``stop``."""
        begin, end = int(self.starts[first]), int(self.starts[stop])
        return TokenGroups(
            self.rows[begin:end], self.tokens[begin:end], self.starts[first : stop + 1] - begin
        )


@dataclass(frozen=True)
class PairedGroups:
    """As many groups of the student as of a teacher; groups of the same place are compared."""

    student: TokenGroups
    teacher: TokenGroups

    def __len__(self) -> int:
        return len(self.student.starts) - 1


class _Side(NamedTuple):
    """One side of a batch, its examples one after another; every array has ``batch · time`` entries."""

    tokens: Integers
    begin: Integers
    """First character of each token."""
    end: Integers
    example: Integers
    place: Integers
    """Position in the completion, from 0; negative in the prompt."""
    usable: Flags
    """Whether a token has text, and logits that predict it; and a label, where the side is the student's."""


def _read_side(side: Mapping[str, Any], *, labelled: bool) -> _Side:
    mask = side["attention_mask"].cpu().numpy().astype(bool)
    spans = side["spans"].cpu().numpy().astype(np.int64)
    in_prompt = side["segments"].cpu().numpy() == PROMPT
    batch, time = mask.shape
    usable = mask & (spans[..., 1] > spans[..., 0])
    usable[:, 1:] &= mask[:, :-1]
    usable[:, :1] = False
    if labelled:
        usable &= side["labels"].cpu().numpy() != NO_LABEL
    # Padding may be left of the text, so the completion begins after the last token of the prompt.
    start = np.where(in_prompt, np.arange(time) + 1, 0).max(1, initial=0)
    return _Side(
        tokens=side["input_ids"].cpu().numpy().astype(np.int64).ravel(),
        begin=spans[..., 0].ravel(),
        end=spans[..., 1].ravel(),
        example=np.repeat(np.arange(batch), time),
        place=(np.arange(time) - start[:, None]).ravel(),
        usable=usable.ravel(),
    )


def pair_by_order(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> PairedGroups:
    """Pair the k-th token of the student's completion with the k-th of the teacher's, one to a group.

    A pair counts if both tokens have text and the student's has a label. What is longer has no partner at its
    end.

    Args:
        student: the student's side of the batch.
        teacher: the teacher's side.

    Source: Boizard et al. 2024 (arXiv 2402.12030): the longer sequence is cut.
    """
    own, theirs = _read_side(student, labelled=True), _read_side(teacher, labelled=False)
    stride = int(max(own.place.max(initial=0), theirs.place.max(initial=0))) + 1
    own_rows = np.flatnonzero(own.usable & (own.place >= 0))
    t_rows = np.flatnonzero(theirs.usable & (theirs.place >= 0))
    _, own_chosen, t_chosen = np.intersect1d(
        own.example[own_rows] * stride + own.place[own_rows],
        theirs.example[t_rows] * stride + theirs.place[t_rows],
        assume_unique=True,
        return_indices=True,
    )
    ones = np.ones(len(own_chosen), dtype=np.int64)
    return PairedGroups(
        _groups_of(own, own_rows[own_chosen], ones), _groups_of(theirs, t_rows[t_chosen], ones)
    )


def pair_by_characters(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> PairedGroups:
    """Pair the smallest groups of tokens that cover the same characters of one text.

    Tokens of both sides that share a character are in one group, and so are all that they share characters
    with. A pair counts if each side's tokens follow one another without a gap, all of them have text and all
    of the student's have labels. Characters that one tokenizer leaves out, such as spaces before a word, do
    not part a group.

    Args:
        student: the student's side of the batch.
        teacher: the teacher's side; it reads the same text.
    """
    own, theirs = _read_side(student, labelled=True), _read_side(teacher, labelled=False)
    own_rows = np.flatnonzero(own.end > own.begin)
    t_rows = np.flatnonzero(theirs.end > theirs.begin)
    # Every example's characters are numbered after those of the example before it.
    stride = int(max(own.end.max(initial=0), theirs.end.max(initial=0)))
    sides = ((own, own_rows), (theirs, t_rows))
    begins = [side.begin[rows] + side.example[rows] * stride for side, rows in sides]
    ends = [side.end[rows] + side.example[rows] * stride for side, rows in sides]
    groups = _connected_groups(np.concatenate(begins), np.concatenate(ends))
    own_group, t_group = groups[: len(own_rows)], groups[len(own_rows) :]
    count = int(groups.max(initial=-1)) + 1
    counts = _groups_that_count(own, own_rows, own_group, count)
    counts &= _groups_that_count(theirs, t_rows, t_group, count)
    return PairedGroups(
        _chosen_groups(own, own_rows, own_group, counts), _chosen_groups(theirs, t_rows, t_group, counts)
    )


def _connected_groups(begin: Integers, end: Integers) -> Integers:
    """Return the group of every interval: intervals that overlap, at once or by others, share one."""
    order = np.lexsort((end, begin))
    reached = np.maximum.accumulate(end[order])
    begins_group = np.append(False, begin[order][1:] >= reached[:-1])[: len(order)]
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = begins_group.cumsum()
    return groups


def _groups_that_count(side: _Side, rows: Integers, group: Integers, count: int) -> Flags:
    """Return for every group whether this side has tokens in it, adjacent and all of them usable."""
    size = np.bincount(group, minlength=count)
    usable = np.bincount(group, weights=side.usable[rows], minlength=count)
    first = np.full(count, len(side.tokens))
    last = np.full(count, -1)
    np.minimum.at(first, group, rows)
    np.maximum.at(last, group, rows)
    counts: Flags = (size > 0) & (usable == size) & (last - first + 1 == size)
    return counts


def _chosen_groups(side: _Side, rows: Integers, group: Integers, counts: Flags) -> TokenGroups:
    kept = counts[group]
    rows, group = rows[kept], group[kept]
    order = np.lexsort((rows, group))
    sizes = np.bincount(group, minlength=len(counts))[counts]
    return _groups_of(side, rows[order], sizes)


def _groups_of(side: _Side, rows: Integers, sizes: Integers) -> TokenGroups:
    starts = np.concatenate([np.zeros(1, dtype=np.int64), sizes.cumsum()])
    return TokenGroups(
        torch.from_numpy(rows - 1), torch.from_numpy(side.tokens[rows]), torch.from_numpy(starts)
    )
