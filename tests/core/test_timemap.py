"""The time map against the matrix it stands for, built by loops."""

from __future__ import annotations

import pytest
import torch

from kava_core.kv.timemap import TimeMap

torch.set_num_threads(1)
BATCH, LAYER, HEAD, T_TIME, TIME, DIM = 2, 3, 2, 5, 7, 4


def draw(seed=0, taps=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, T_TIME, (BATCH, TIME, taps), generator=generator)
    weight = torch.rand(BATCH, TIME, taps, generator=generator)
    valid = torch.rand(BATCH, TIME, generator=generator) < 0.7
    x = torch.randn(BATCH, LAYER, HEAD, T_TIME, DIM, dtype=torch.float64, generator=generator)
    return TimeMap(index, weight / weight.sum(-1, keepdim=True), valid), x.to(dtype)


def matrix(time_map, t_time=T_TIME):
    """``[batch, time, t_time]`` in float64, tap by tap."""
    batch, time, taps = time_map.index.shape
    found = torch.zeros(batch, time, t_time, dtype=torch.float64)
    for b in range(batch):
        for i in range(time):
            for k in range(taps if time_map.valid[b, i] else 0):
                found[b, i, time_map.index[b, i, k]] += time_map.weight[b, i, k].double()
    return found


def slow_apply(time_map, x):
    return torch.einsum("bij,blhjd->blhid", matrix(time_map), x.double())


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize("taps", [1, 2, 6])
def test_apply_is_the_matrix_product(dtype, close, taps):
    time_map, x = draw(taps=taps, dtype=dtype)
    found = time_map.apply(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), slow_apply(time_map, x), rtol=close, atol=close)


def test_apply_takes_any_memory_layout():
    time_map, x = draw()
    strided = x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
    torch.testing.assert_close(time_map.apply(strided), slow_apply(time_map, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_is_the_transposed_product(dtype):
    time_map, x = draw(dtype=dtype)
    x.requires_grad_()
    upstream = torch.randn(BATCH, LAYER, HEAD, TIME, DIM, dtype=dtype)
    (found,) = torch.autograd.grad(time_map.apply(x), x, upstream)
    wanted = torch.einsum("bij,blhid->blhjd", matrix(time_map), upstream.double())
    close = 1e-12 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)


def test_dense_is_the_matrix():
    time_map, _ = draw()
    torch.testing.assert_close(time_map.dense(T_TIME).double(), matrix(time_map), rtol=0, atol=1e-6)


def test_invalid_positions_hold_zeros_whatever_they_read():
    time_map, x = draw()
    nowhere = TimeMap(time_map.index, time_map.weight, torch.zeros_like(time_map.valid))
    x.fill_(torch.nan).requires_grad_()
    found = nowhere.apply(x)
    assert torch.equal(found, torch.zeros_like(found))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_teacher_positions_give_zeros():
    time_map, x = draw()
    found = time_map.apply(x[:, :, :, :0])
    assert torch.equal(found, x.new_zeros(BATCH, LAYER, HEAD, TIME, DIM))


def test_identity_returns_its_argument():
    _, x = draw()
    same = TimeMap.same(torch.ones(BATCH, T_TIME, dtype=torch.bool))
    assert same.apply(x) is x
    assert torch.equal(same.dense(T_TIME), torch.eye(T_TIME).expand(BATCH, -1, -1))


def test_between_and_gather():
    valid = torch.tensor([[True, True, False]])
    low, high = torch.tensor([[0, 2, 99]]), torch.tensor([[1, 3, 99]])
    x = torch.randn(1, 1, 1, 4, 2, dtype=torch.float64)
    found = TimeMap.between(low, high, torch.tensor([[0.25, 0.5, 0.0]]), valid).apply(x)[0, 0, 0]
    rows = x[0, 0, 0]
    wanted = torch.stack([0.75 * rows[0] + 0.25 * rows[1], (rows[2] + rows[3]) / 2, torch.zeros(2)])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(TimeMap.gather(low, valid).apply(x)[0, 0, 0, :2], rows[[0, 2]])


def test_meta_shapes():
    time_map, x = draw()
    meta = TimeMap(*(t.to("meta") for t in (time_map.index, time_map.weight, time_map.valid)))
    assert meta.apply(x.to("meta")).shape == (BATCH, LAYER, HEAD, TIME, DIM)
