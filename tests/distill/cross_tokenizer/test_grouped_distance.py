"""Distances across vocabularies against the papers' formulas, written as loops in float64."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.distill.cross_tokenizer import grouped_distance as module
from kava_core.distill.cross_tokenizer.grouped_distance import Comparison, grouped_distance
from kava_core.distill.cross_tokenizer.token_groups import PairedGroups, TokenGroups
from kava_core.distill.logits import logit_divergence

SHARED, T_SHARED = [0, 3, 4], [5, 1, 0]
WIDTH, T_WIDTH = 6, 9


class Vocabularies(nn.Module):
    """A stand-in with the attributes that are read: three of six tokens are three of nine."""

    def __init__(self, shared: list[int], t_shared: list[int], width: int, t_width: int) -> None:
        super().__init__()
        self.width, self.t_width = width, t_width
        self.own, self.theirs = torch.tensor(shared), torch.tensor(t_shared)
        self.own_rest = _rest(shared, width)
        self.their_rest = _rest(t_shared, t_width)


def _rest(shared: list[int], width: int) -> Tensor:
    return torch.tensor([number for number in range(width) if number not in shared], dtype=torch.long)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def groups(rows: list[list[int]], tokens: list[list[int]]) -> TokenGroups:
    sizes = [len(row) for row in rows]
    starts = torch.tensor([sum(sizes[:count]) for count in range(len(sizes) + 1)])
    flat = [torch.tensor([*chain.from_iterable(lists)], dtype=torch.long) for lists in (rows, tokens)]
    return TokenGroups(flat[0], flat[1], starts)


ROWS, TOKENS = [[0], [2, 3, 4], [6], [8]], [[1], [5, 0, 2], [3], [4]]
T_ROWS, T_TOKENS = [[1], [3], [5, 6], [13]], [[8], [2], [7, 1], [0]]
PAIRS = PairedGroups(groups(ROWS, TOKENS), groups(T_ROWS, T_TOKENS))


def entries(logits: Tensor, rows: list[int], tokens: list[int], width: int, temperature: float) -> Tensor:
    """The chain rule, factor by factor."""
    chance = torch.ones((), dtype=torch.float64)
    for row, token in zip(rows[:-1], tokens[:-1], strict=True):
        chance = chance * torch.softmax(logits[row, :width].double() / temperature, -1)[token]
    return chance * torch.softmax(logits[rows[-1], :width].double() / temperature, -1)


def sorted_l1(q: list[Tensor], p: list[Tensor]) -> Tensor:
    """Zero-padded, sorted, entry by entry."""
    zero = torch.zeros((), dtype=torch.float64)
    size = max(len(q), len(p))
    q = sorted([*q, *[zero] * (size - len(q))], key=lambda x: float(x.detach()), reverse=True)
    p = sorted([*p, *[zero] * (size - len(p))], key=lambda x: float(x.detach()), reverse=True)
    return sum(((a - b).abs() for a, b in zip(q, p, strict=True)), zero)


def by_loop(student: Tensor, teacher: Tensor, form: str, temperature: float) -> Tensor:
    own_logits, t_logits = student.flatten(0, 1), teacher.flatten(0, 1)
    total = torch.zeros((), dtype=torch.float64)
    for rows, tokens, t_rows, t_tokens in zip(ROWS, TOKENS, T_ROWS, T_TOKENS, strict=True):
        q = entries(own_logits, rows, tokens, WIDTH, temperature)
        p = entries(t_logits, t_rows, t_tokens, T_WIDTH, temperature)
        matches: list[tuple[int, int]] = []
        if form == "spans":
            single = len(rows) == len(t_rows) == 1
            matches = list(zip(SHARED, T_SHARED, strict=True)) if single else [(tokens[-1], t_tokens[-1])]
        for own, theirs in matches:
            total = total + p[theirs] * (p[theirs] / q[own]).log() - p[theirs] + q[own]
        rest = [q[i] for i in range(WIDTH) if i not in [own for own, _ in matches]]
        t_rest = [p[i] for i in range(T_WIDTH) if i not in [theirs for _, theirs in matches]]
        total = total + sorted_l1(rest, t_rest)
    return total * temperature**2


def comparison(form: str, temperature: float = 1.0) -> Comparison:
    vocabularies: Any = Vocabularies(SHARED, T_SHARED, WIDTH, T_WIDTH)
    return Comparison(vocabularies, form == "spans", temperature)


@pytest.mark.parametrize("form", ["sorted", "spans"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("elements", [2**22, 30, 1])
def test_value_and_gradient(
    form: str, temperature: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings have padding, which has no part; blocks of any size give the same."""
    monkeypatch.setattr(module, "ELEMENTS", elements)
    student, teacher = drawn(2, 5, WIDTH + 2).requires_grad_(), 2 * drawn(2, 7, T_WIDTH + 1, seed=1)
    expected = by_loop(student, teacher, form, temperature)
    (slope,) = torch.autograd.grad(expected, student)
    found = grouped_distance(student, teacher, PAIRS, comparison(form, temperature))
    (mine,) = torch.autograd.grad(3 * found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine, 3 * slope)
    assert slope.norm() > 0.01


def test_one_vocabulary_gives_plain_logit_distillation() -> None:
    """All tokens are shared and all groups single: the Kullback–Leibler divergence of ``logits``."""
    student, teacher = drawn(1, 4, 7).requires_grad_(), drawn(1, 4, 7, seed=1)
    numbers = list(range(7))
    vocabularies: Any = Vocabularies(numbers, numbers, 7, 7)
    rows, tokens = [[row] for row in range(4)], [[3], [0], [6], [2]]
    pairs = PairedGroups(groups(rows, tokens), groups(rows, tokens))
    found = grouped_distance(student, teacher, pairs, Comparison(vocabularies, True, 2.0))
    expected = logit_divergence(
        student, teacher, torch.arange(4)[None], torch.ones(1, 4, dtype=torch.float64), temperature=2.0
    )
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(value, student)[0] for value in (found, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", ["sorted", "spans"])
def test_no_pairs_give_zero_with_a_gradient(form: str) -> None:
    student = drawn(1, 3, WIDTH).requires_grad_()
    none = PairedGroups(groups([], []), groups([], []))
    found = grouped_distance(student, drawn(1, 3, T_WIDTH), none, comparison(form))
    (slope,) = torch.autograd.grad(found, student)
    assert float(found.detach()) == 0.0
    assert not slope.any()


@pytest.mark.parametrize("form", ["sorted", "spans"])
def test_rows_of_no_group_have_no_influence(form: str) -> None:
    """Not even NaN; a certain teacher is no NaN either."""
    student, teacher = drawn(2, 5, WIDTH), drawn(2, 7, T_WIDTH, seed=1)
    clean = grouped_distance(student, teacher, PAIRS, comparison(form))
    student[0, 1], teacher[0, 0] = torch.nan, torch.inf
    student.requires_grad_()
    spoilt = grouped_distance(student, teacher, PAIRS, comparison(form))
    torch.testing.assert_close(spoilt, clean)
    teacher[:] = -torch.inf
    teacher[..., 0] = 0.0
    (slope,) = torch.autograd.grad(grouped_distance(student, teacher, PAIRS, comparison("sorted")), student)
    assert torch.isfinite(slope).all()
    assert not slope[0, 1].any()


@pytest.mark.parametrize("form", ["sorted", "spans"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(form: str, dtype: torch.dtype) -> None:
    student = drawn(2, 5, WIDTH, dtype=dtype).requires_grad_()
    teacher = drawn(2, 7, T_WIDTH, seed=1, dtype=dtype)
    found = grouped_distance(student, teacher, PAIRS, comparison(form))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_loop(student, teacher, form, 1.0), rtol=1e-5, atol=1e-6)
    found.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


def test_equal_distributions_have_distance_zero_whatever_their_order() -> None:
    """Sorting forgets which token has which probability: the paper's claim and its weakness."""
    student = drawn(2, 5, WIDTH)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    teacher = torch.full((2, 5, T_WIDTH), -torch.inf, dtype=torch.float64)
    teacher[..., :WIDTH] = student[..., order]
    rows, tokens = [[0], [7]], [[1], [2]]
    pairs = PairedGroups(groups(rows, tokens), groups(rows, tokens))
    assert float(grouped_distance(student, teacher, pairs, comparison("sorted"))) == pytest.approx(
        0, abs=1e-12
    )
