"""The pipeline's choice of order: cheapest, and never a different result."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kava_core.kv.align.stage_order import CANONICAL, Commuting, StageExtents, cheapest_order, multiplications

ANY = Commuting(linear_heads=True, linear_width=True, shared_width=True)


def counted(order: tuple[str, ...], e: StageExtents) -> int:
    """Multiplications counted by doing them: one per (output element, input read)."""
    shape = {"heads": e.t_head, "time": e.t_time, "width": e.t_dim}
    after = {"heads": e.head, "time": e.time, "width": e.dim}
    total = 0
    for stage in order:
        reads = e.taps if stage == "time" else shape[stage] if shape[stage] != after[stage] else 0
        shape[stage] = after[stage]
        total += reads * shape["heads"] * shape["time"] * shape["width"]
    return total


extents = st.builds(StageExtents, *(st.integers(1, 9) for _ in range(6)), taps=st.integers(0, 3))


@given(extents, st.sampled_from(list(permutations(CANONICAL))))
def test_cost_counts_every_multiplication(e: StageExtents, order: tuple[str, ...]) -> None:
    assert multiplications(order, e) == counted(order, e)


@given(extents)
def test_cheapest_of_all_orders(e: StageExtents) -> None:
    assert counted(cheapest_order(e, ANY), e) == min(counted(order, e) for order in permutations(CANONICAL))


@given(extents)
def test_without_promises_the_order_is_canonical(e: StageExtents) -> None:
    assert cheapest_order(e, Commuting()) == CANONICAL


def test_published_rule_for_heads_first() -> None:
    """Heads come first iff Ht·Hs·Dt + Hs·Dt·Ds < Ht·Dt·Ds + Ht·Hs·Ds."""
    for t_head, head, t_dim, dim in [
        (28, 2, 128, 64),
        (8, 2, 128, 64),
        (2, 8, 64, 128),
        (4, 4, 64, 32),
        (2, 16, 32, 64),
    ]:
        e = StageExtents(t_head, head, 10, 10, t_dim, dim, taps=0)
        mixing = 0 if t_head == head else 1
        heads_first = mixing * t_head * head * t_dim + head * t_dim * dim
        width_first = t_head * t_dim * dim + mixing * t_head * head * dim
        order = cheapest_order(e, ANY)
        assert (order.index("heads") < order.index("width")) == (heads_first <= width_first)


@pytest.mark.parametrize("order", list(permutations(CANONICAL)))
def test_affine_stages_commute(order: tuple[str, ...]) -> None:
    """The claim behind the freedom: row-stochastic maps commute with an affine projection."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    heads = torch.rand(2, 4, generator=g, dtype=torch.float64)
    heads /= heads.sum(1, keepdim=True)
    time = torch.rand(7, 5, generator=g, dtype=torch.float64)
    time /= time.sum(1, keepdim=True)
    width, mean = (
        torch.randn(3, 6, generator=g, dtype=torch.float64),
        torch.randn(6, generator=g, dtype=torch.float64),
    )
    stages = {
        "heads": lambda y: torch.einsum("gh,blhtd->blgtd", heads, y),
        "time": lambda y: torch.einsum("st,blhtd->blhsd", time, y),
        "width": lambda y: (y - mean) @ width.T,
    }
    expected, found = x, x
    for canonical, stage in zip(CANONICAL, order, strict=True):
        expected, found = stages[canonical](expected), stages[stage](found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
