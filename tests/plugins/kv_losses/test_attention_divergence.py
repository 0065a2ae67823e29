"""The divergence of attention rows against loops and against whole maps, in float64."""

from __future__ import annotations

import pytest
import torch

from kava_plugins.kv_losses import _row_blocks
from kava_plugins.kv_losses._attention_divergence import attention_divergence
from tests.plugins.kv_losses.attention_helpers import (
    CASES,
    Rows,
    dense_divergence,
    draw_rows,
    draw_weight,
    slow_divergence,
)

torch.set_num_threads(1)
each_case = pytest.mark.parametrize("case", CASES)
each_kind = pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys"])


@pytest.fixture(params=[(8, 100), (2**19, 1000), (2**19, 2**17)], ids=["small blocks", "pieces", "as usual"])
def extents_of_blocks(request, monkeypatch):
    elements, piece = request.param
    monkeypatch.setitem(_row_blocks.ELEMENTS, "cpu", elements)
    monkeypatch.setitem(_row_blocks.PIECE, "cpu", piece)


def agree(rows, weight, slow=slow_divergence, scale=1e-10, **options):
    found = attention_divergence(*rows, weight, **options)
    wanted = slow(rows, weight, **options)
    torch.testing.assert_close(found, wanted, rtol=scale, atol=scale)
    for mine, theirs in zip(*(torch.autograd.grad(3 * x, rows) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=scale, atol=scale)


@each_case
@each_kind
@pytest.mark.parametrize("causal", [True, False])
def test_value_and_all_four_gradients_are_the_loops(case, kind, causal):
    agree(draw_rows(**CASES[case]), draw_weight(), kind=kind, causal=causal, temperature=1.7)


@each_case
@each_kind
@pytest.mark.parametrize("holes", [0.0, 0.4])
@pytest.mark.usefixtures("extents_of_blocks")
def test_over_many_blocks(case, kind, holes):
    rows = draw_rows(**CASES[case], time=70, batch=2, layer=3)
    agree(rows, draw_weight(2, 3, 70, holes), dense_divergence, kind=kind)


@pytest.mark.parametrize("time", [0, 1])
@each_kind
def test_no_position_and_one_lose_nothing(time, kind):
    rows = draw_rows(time=time)
    found = attention_divergence(*rows, torch.ones(2, 2, time).double(), kind=kind)
    assert found == 0
    assert not any(x.any() for x in torch.autograd.grad(found, rows))


@pytest.mark.parametrize("extents", [{"batch": 0}, {"layer": 0}])
def test_nothing_to_compare(extents):
    rows = draw_rows(**extents)
    weight = torch.ones(rows.queries.shape[0], rows.queries.shape[1], 7)
    assert attention_divergence(*rows, weight) == 0


@each_kind
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_positions_of_weight_0_are_neither_rows_nor_keys(kind, junk):
    rows, weight = draw_rows(), draw_weight()
    weight[0] = 0
    hole = (weight == 0)[:, :, None, :, None]
    dirty = Rows(*(torch.where(hole, junk, x).detach().requires_grad_() for x in rows))
    values, slopes = [], []
    for one in (rows, dirty):
        values.append(attention_divergence(*one, weight, kind=kind))
        slopes.append(torch.autograd.grad(values[-1], one))
    assert torch.equal(*values)
    for mine, theirs in zip(*slopes, strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.where(hole, theirs, 0).any()


@each_kind
def test_equal_sides_lose_nothing_and_have_no_slope(kind):
    queries, keys, *_ = draw_rows(dtype=torch.float32)
    rows = Rows(queries, keys, queries.detach().clone(), keys.detach().clone())
    found = attention_divergence(*rows, draw_weight().float(), kind=kind)
    assert found == 0
    assert not any(x.any() for x in torch.autograd.grad(found, rows[:2]))


@each_kind
def test_only_the_wanted_gradients_are_formed(kind):
    rows = draw_rows()
    fixed = Rows(*rows[:2], *(x.detach() for x in rows[2:]))
    found, wanted = (attention_divergence(*one, draw_weight(), kind=kind) for one in (fixed, rows))
    slopes = (torch.autograd.grad(x, rows[:2], retain_graph=True) for x in (found, wanted))
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert [x is None for x in found.grad_fn.saved_tensors][:4] == [False, False, True, True]
    assert not any(x is None for x in wanted.grad_fn.saved_tensors)
    with torch.no_grad():
        assert not attention_divergence(*rows, draw_weight(), kind=kind).requires_grad


@each_kind
def test_the_derivative_by_a_weight_is_the_row(kind):
    """A router learns by it; at weight 0 there is none."""
    rows, weight = draw_rows(), draw_weight().requires_grad_()
    (found,) = torch.autograd.grad(2 * attention_divergence(*rows, weight, kind=kind), weight)
    for at in weight.nonzero()[::3].tolist():
        moved = weight.detach().clone()
        moved[tuple(at)] += 0.5
        rise = attention_divergence(*rows, moved, kind=kind) - attention_divergence(*rows, weight, kind=kind)
        torch.testing.assert_close(found[tuple(at)], 2 * rise / 0.5)
    assert not found[weight == 0].any()


def test_kinds_are_not_alike():
    rows, weight = draw_rows(), draw_weight()
    found = [attention_divergence(*rows, weight, kind=kind).item() for kind in ("forward", "reverse")]
    both = attention_divergence(*rows, weight, kind="jeffreys").item()
    assert abs(found[0] - found[1]) > 1e-3
    assert both == pytest.approx(sum(found), rel=1e-12)


def test_examples_layers_and_padding_are_independent():
    rows, weight = draw_rows(batch=3, layer=2, time=9), draw_weight(3, 2, 9)
    whole = attention_divergence(*rows, weight)
    apart = [
        attention_divergence(*(x[b : b + 1, n : n + 1] for x in rows), weight[b : b + 1, n : n + 1])
        for b in range(3)
        for n in range(2)
    ]
    torch.testing.assert_close(torch.stack(apart).sum(), whole)
    padded = (torch.nn.functional.pad(x, (0, 0, 3, 2), value=4.0) for x in rows)
    torch.testing.assert_close(attention_divergence(*padded, torch.nn.functional.pad(weight, (3, 2))), whole)


def near(noise, dtype, time=192):
    """A student near its target, as in training; and both in float64 as they were rounded."""
    rows = draw_rows(batch=1, layer=1, time=time, dim=32, t_dim=32, seed=3)
    other = draw_rows(batch=1, layer=1, time=time, dim=32, t_dim=32, seed=4)
    student = (t + noise * x for t, x in zip(rows[2:], other[:2], strict=True))
    return Rows(*(x.detach().to(dtype).requires_grad_() for x in (*student, *rows[2:])))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("noise", "small"), [(0.04, 1e-2), (0.005, 2e-4)])
def test_small_divergences_are_precise(kind, dtype, noise, small):
    """With bfloat16 products the gradient is 20 % wrong at 2e-3 and noise at 4e-5."""
    rows = near(noise if dtype == torch.float32 else max(noise, 0.01), dtype)
    wide = Rows(*(x.detach().double().requires_grad_() for x in rows))
    weight = torch.full((1, 1, 192), 1 / 192)
    found = attention_divergence(*rows, weight, kind=kind)
    wanted = dense_divergence(wide, weight.double(), kind=kind)
    assert found.dtype == torch.float32
    assert 1e-6 < wanted < 5 * small
    assert abs(found.double() / wanted - 1) < 2e-3
    slopes = (torch.autograd.grad(x, one[:2]) for x, one in ((found, rows), (wanted, wide)))
    bound = 1e-3 if dtype == torch.float32 else 5e-3  # a bfloat16 gradient is rounded once, to 8 bits
    for mine, theirs in zip(*slopes, strict=True):
        assert (mine.double() - theirs).norm() < bound * theirs.norm()


def test_products_stay_in_float32_under_autocast():
    rows, weight = draw_rows(dtype=torch.float32), draw_weight().float()
    wanted = attention_divergence(*rows, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_divergence(*rows, weight), wanted)


def test_large_products_stay_finite():
    rows = Rows(*((100 * x).detach().requires_grad_() for x in draw_rows(dtype=torch.float32)))
    found = attention_divergence(*rows, draw_weight().float(), kind="jeffreys")
    assert found.isfinite()
    assert found > 1
    assert all(x.isfinite().all() for x in torch.autograd.grad(found, rows))


@each_kind
def test_powers_that_underflow_are_those_of_float64(kind):
    """Products hundreds apart: most of a row's powers are 0, or smaller than normal numbers, in float32."""
    rows = Rows(*((6 * x).detach().requires_grad_() for x in draw_rows(dtype=torch.float32, time=40)))
    wide = Rows(*(x.detach().double().requires_grad_() for x in rows))
    weight = draw_weight(time=40)
    found = attention_divergence(*rows, weight.float(), kind=kind)
    wanted = dense_divergence(wide, weight, kind=kind)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    slopes = (torch.autograd.grad(x, one) for x, one in ((found, rows), (wanted, wide)))
    for mine, theirs in zip(*slopes, strict=True):
        assert (mine.double() - theirs).norm() < 1e-4 * theirs.norm()


def test_a_graph_may_be_walked_twice():
    rows = draw_rows()
    found = attention_divergence(*rows, draw_weight())
    once, again = (torch.autograd.grad(found, rows, retain_graph=True) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)


def test_zero_queries_attend_to_all_alike():
    """A student without directions has uniform rows; both its slopes are finite."""
    rows = draw_rows()
    zero = Rows(*(torch.zeros_like(x).requires_grad_() for x in rows[:2]), *rows[2:])
    agree(zero, draw_weight())


def test_no_product_of_whole_rows_is_made(monkeypatch):
    """The largest tensor of a forward and backward pass does not grow with the square of time."""
    sizes = []
    for time in (256, 1024):
        rows = draw_rows(batch=1, layer=1, qhead=2, head=1, t_head=1, time=time, dtype=torch.float32)
        with Largest() as largest:
            attention_divergence(*rows, torch.ones(1, 1, time)).backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] <= _row_blocks.ELEMENTS["cpu"] < 2 * 1024**2


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_meta_shapes():
    rows = Rows(*(x.to("meta") for x in draw_rows()))
    found = attention_divergence(*rows, draw_weight().to("meta"))
    assert found.is_meta
    assert found.shape == ()
