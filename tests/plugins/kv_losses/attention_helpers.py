"""Attention rows by loops in float64, and random queries and keys to make them of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CASES = {
    "one KV head for two query heads": {"qhead": 4, "head": 2, "t_head": 2},
    "as many as query heads": {"qhead": 2, "head": 2, "t_head": 2},
    "one head": {"qhead": 1, "head": 1, "t_head": 1},
    "groups of 2 against groups of 3": {"qhead": 6, "head": 3, "t_head": 2},
    "other widths": {"qhead": 4, "head": 1, "t_head": 4, "dim": 3, "t_dim": 5},
}


class Rows(NamedTuple):
    """Queries and keys of student and target."""

    queries: Tensor
    keys: Tensor
    target_queries: Tensor
    target_keys: Tensor


def draw_rows(
    *, batch=2, layer=2, qhead=4, head=2, t_head=2, time=7, dim=4, t_dim=4, dtype=torch.float64, seed=0
):
    """Random tensors that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    extents = ((qhead, dim), (head, dim), (qhead, t_dim), (t_head, t_dim))
    made = (torch.randn(batch, layer, h, time, d, generator=generator).double() for h, d in extents)
    return Rows(*((1.5 * x).to(dtype).requires_grad_() for x in made))


def draw_weight(batch=2, layer=2, time=7, holes=0.3, seed=7):
    """Weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(batch, layer, time, generator=generator).double() + 0.1
    return weight * (torch.rand(batch, layer, time, generator=generator) >= holes)


def slow_rows(queries, keys, h, i, seen, temperature):
    """log softmax of row i of query head h of one example and layer, over the positions seen."""
    key = keys[h * len(keys) // len(queries)]
    width = queries.shape[-1] ** 0.5 * temperature
    return torch.log_softmax(torch.stack([queries[h, i] @ key[j] / width for j in seen]), 0)


def slow_kl(student, target, kind):
    """The definition, from log-probabilities."""
    forward = (target.exp() * (target - student)).sum()
    reverse = (student.exp() * (student - target)).sum()
    return {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[kind]


def slow_divergence(rows, weight, *, causal=True, temperature=1.0, kind="forward"):
    """Σ weight × mean over query heads of the divergence, by loops."""
    total = torch.zeros((), dtype=torch.float64)
    for b, layer, i in weight.nonzero().tolist():
        seen = [j for j in range(weight.shape[2]) if weight[b, layer, j] != 0 and (j <= i or not causal)]
        q, k, t_q, t_k = (x[b, layer].double() for x in rows)
        each = [
            slow_kl(
                slow_rows(q, k, h, i, seen, temperature), slow_rows(t_q, t_k, h, i, seen, temperature), kind
            )
            for h in range(len(q))
        ]
        total = total + weight[b, layer, i] * torch.stack(each).mean()
    return total


def dense_divergence(rows, weight, *, causal=True, temperature=1.0, kind="forward"):
    """The same by whole maps in float64, for longer rows."""
    dead = (weight == 0)[:, :, None, None, :].expand(-1, -1, 1, weight.shape[2], -1)
    if causal:
        dead = dead | torch.ones(dead.shape[-2:], dtype=torch.bool).triu(1)
    maps = []
    for queries, keys in (rows[:2], rows[2:]):
        keys = keys.double().repeat_interleave(queries.shape[2] // keys.shape[2], 2)
        scores = queries.double() @ keys.mT / (queries.shape[-1] ** 0.5 * temperature)
        maps.append(scores.masked_fill(dead, -1e30).log_softmax(-1))
    student, target = maps
    forward = (target.exp() * (target - student)).sum(-1)
    reverse = (student.exp() * (student - target)).sum(-1)
    each = {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[kind].mean(2)
    return torch.where(weight != 0, each * weight, 0).sum()
