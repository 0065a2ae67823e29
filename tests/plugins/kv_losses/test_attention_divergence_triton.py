"""The Triton kernels in Triton's interpreter, against whole maps in float64. They ran on no GPU yet."""

from __future__ import annotations

import os

import pytest
import torch

from kava_plugins.kv_losses import _attention_divergence as module
from tests.plugins.kv_losses.attention_helpers import CASES, Rows, dense_divergence, draw_rows, draw_weight

torch.set_num_threads(1)
pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported", allow_module_level=True)
each_kind = pytest.mark.parametrize("kind", ["forward", "reverse", "jeffreys"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    from kava_plugins.kv_losses._attention_divergence_triton import fused_divergence

    monkeypatch.setattr(module, "_backend", lambda mine: fused_divergence)


def agree(rows, weight, **options):
    wide = Rows(*(x.detach().double().requires_grad_() for x in rows))
    found = module.attention_divergence(*rows, weight.float(), **options)
    wanted = dense_divergence(wide, weight, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    slopes = (torch.autograd.grad(3 * x, one) for x, one in ((found, rows), (wanted, wide)))
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@each_kind
def test_value_and_all_four_gradients(case, kind):
    rows = draw_rows(**CASES[case], batch=1, layer=1, time=66, dtype=torch.float32)
    agree(rows, draw_weight(1, 1, 66), kind=kind, temperature=1.3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("holes", [0.0, 0.5])
def test_masks(causal, holes):
    rows = draw_rows(batch=1, layer=1, time=130, qhead=2, head=1, t_head=1, dtype=torch.float32)
    agree(rows, draw_weight(1, 1, 130, holes), causal=causal)


@each_kind
def test_dead_positions_may_hold_anything(kind):
    rows, weight = draw_rows(dtype=torch.float32), draw_weight()
    weight[0] = 0
    hole = (weight == 0)[:, :, None, :, None]
    dirty = Rows(*(torch.where(hole, float("nan"), x).detach().requires_grad_() for x in rows))
    values = [module.attention_divergence(*one, weight.float(), kind=kind) for one in (rows, dirty)]
    assert torch.equal(*values)
    slopes = (torch.autograd.grad(x, one) for x, one in zip(values, (rows, dirty), strict=True))
    for mine, theirs in zip(*slopes, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("time", [0, 1])
@each_kind
def test_no_position_and_one(time, kind):
    rows = draw_rows(time=time, dtype=torch.float32)
    found = module.attention_divergence(*rows, torch.ones(2, 2, time), kind=kind)
    assert found.abs() < 1e-6
    assert all(x.abs().sum() < 1e-6 for x in torch.autograd.grad(found, rows))


def test_a_fixed_target_gets_no_gradient():
    rows = draw_rows(dtype=torch.float32)
    fixed = Rows(*rows[:2], *(x.detach() for x in rows[2:]))
    weight = draw_weight().float()
    slopes = [
        torch.autograd.grad(module.attention_divergence(*one, weight), rows[:2]) for one in (fixed, rows)
    ]
    for mine, theirs in zip(*slopes, strict=True):
        assert torch.equal(mine, theirs)


def test_small_divergences_are_precise():
    rows = draw_rows(batch=1, layer=1, time=96, dim=32, t_dim=32, dtype=torch.float32)
    near = Rows(*((t + 0.01 * x).detach().requires_grad_() for t, x in zip(rows[2:], rows[:2], strict=True)),
                *rows[2:])  # fmt: skip
    found = module.attention_divergence(*near, torch.full((1, 1, 96), 1 / 96))
    wanted = dense_divergence(near, torch.full((1, 1, 96), 1 / 96).double())
    assert 1e-6 < wanted < 1e-3
    assert abs(found.double() / wanted - 1) < 5e-3
