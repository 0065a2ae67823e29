"""The time map against the matrix it stands for, built by loops."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.protocols.time_map import TimeMap, expand_ranges

torch.set_num_threads(1)
BATCH, LAYER, HEAD, T_TIME, TIME, DIM = 2, 3, 2, 5, 7, 4
LONG = 101
"""So many teacher positions that the map reads few of them."""


def equal_taps(seed=0, taps=3, t_time=T_TIME, time=TIME):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, t_time, (BATCH, time, taps), generator=generator)
    weight = torch.rand(BATCH, time, taps, generator=generator)
    valid = torch.rand(BATCH, time, generator=generator) < 0.7
    return TimeMap.of_taps(index, weight / weight.sum(-1, keepdim=True), valid)


def ragged(seed=0, taps=4, t_time=T_TIME, time=TIME):
    """Up to ``taps`` taps in a row, some rows without any, some taps named twice."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, taps + 1, (BATCH * time,), generator=generator)
    row = torch.repeat_interleave(count)
    index = torch.randint(0, t_time, row.shape, generator=generator)
    weight = torch.rand(row.shape, generator=generator)
    valid = torch.rand(BATCH, time, generator=generator) < 0.8
    return TimeMap.of_entries(row, index, weight, valid)


def cache(t_time=T_TIME, dtype=torch.float64, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LAYER, HEAD, t_time, DIM, dtype=torch.float64, generator=generator).to(dtype)


def matrix(time_map, t_time=T_TIME):
    """``[batch, time, t_time]`` in float64, tap by tap."""
    batch, time = time_map.valid.shape
    start, found = time_map.start.tolist(), torch.zeros(batch, time, t_time, dtype=torch.float64)
    for row in range(batch * time):
        b, i = divmod(row, time)
        for k in range(start[row], start[row + 1] if time_map.valid[b, i] else start[row]):
            found[b, i, time_map.index[k]] += time_map.weight[k].double()
    return found


def product(dense, x):
    return torch.einsum("bij,blhjd->blhid", dense, x.double())


MAPS = pytest.mark.parametrize("make", [equal_taps, ragged])
LENGTHS = pytest.mark.parametrize("t_time", [T_TIME, LONG])


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("taps", [1, 2, 6])
@MAPS
@LENGTHS
def test_apply_is_the_matrix_product(dtype, close, taps, make, t_time):
    time_map, x = make(taps=taps, t_time=t_time), cache(t_time, dtype)
    found = time_map.apply(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), product(matrix(time_map, t_time), x), rtol=close, atol=close)


@LENGTHS
def test_apply_takes_any_memory_layout(t_time):
    time_map, x = ragged(t_time=t_time), cache(t_time)
    strided = x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
    torch.testing.assert_close(time_map.apply(strided), product(matrix(time_map, t_time), x))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
@MAPS
@LENGTHS
def test_gradient_is_the_transposed_product(dtype, close, make, t_time):
    time_map, x = make(t_time=t_time), cache(t_time, dtype).requires_grad_()
    upstream = cache(TIME, dtype, seed=8)
    (found,) = torch.autograd.grad(time_map.apply(x), x, upstream)
    wanted = torch.einsum("bij,blhid->blhjd", matrix(time_map, t_time), upstream.double())
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)


@MAPS
def test_second_gradients(make):
    x = cache()[:, :1, :1, :, :1].requires_grad_()
    assert torch.autograd.gradcheck(make().apply, (x,))
    assert torch.autograd.gradgradcheck(make().apply, (x,))


@LENGTHS
def test_half_precision_is_summed_in_float32(t_time):
    """600 summands of 1/600: in bfloat16 the sum would stand still below 1."""
    index = (torch.arange(600) % t_time).view(1, 1, 600)
    time_map = TimeMap.of_taps(index, torch.full((1, 1, 600), 1 / 600), torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(
        time_map.apply(torch.ones(1, 1, 1, t_time, 2).bfloat16()), torch.ones(1, 1, 1, 1, 2).bfloat16()
    )


@MAPS
def test_dense_is_the_matrix(make):
    torch.testing.assert_close(make().dense(T_TIME).double(), matrix(make()), rtol=0, atol=1e-6)


@given(st.integers(0, 2**31), st.sampled_from([equal_taps, ragged]))
@settings(max_examples=40, deadline=None)
def test_rows_sum_to_one_where_valid_and_are_empty_elsewhere(seed, make):
    time_map = make(seed)
    torch.testing.assert_close(matrix(time_map).sum(-1), time_map.valid.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("invalid_everywhere", [False, True])
@MAPS
@LENGTHS
def test_invalid_positions_hold_zeros_whatever_they_read(make, t_time, invalid_everywhere):
    made = make(t_time=t_time)
    valid = torch.zeros_like(made.valid) if invalid_everywhere else made.valid
    time_map = TimeMap(made.index, made.weight, made.start, valid)
    x = torch.full((BATCH, LAYER, HEAD, t_time, DIM), torch.nan, requires_grad=True)
    found = time_map.apply(x)
    nothing = found.movedim(3, 1)[~valid]
    assert torch.equal(nothing, torch.zeros_like(nothing))
    upstream = torch.where(valid[:, None, None, :, None], 1.0, torch.nan).expand_as(found)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    assert gradient.isfinite().all()
    assert not (invalid_everywhere and gradient.any())


def test_taps_without_weight_are_not_read():
    x = torch.tensor([torch.nan, 2.0, 4.0]).view(1, 1, 1, 3, 1)
    valid = torch.ones(1, 2, dtype=torch.bool)
    index, weight = torch.tensor([[[0, 1], [2, 1]]]), torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    assert TimeMap.of_taps(index, weight, valid).apply(x).flatten().tolist() == [2, 3]


def test_entries_are_normalised_and_rows_without_weight_invalid():
    row = torch.tensor([0, 0, 1, 3, 3, 4])
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0, 5.0])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    found = TimeMap.of_entries(row, torch.tensor([0, 1, 2, 2, 2, 1]), weight, valid)
    assert found.valid.tolist() == [[True, False, False], [True, False, False]]
    assert found.dense(3)[0, 0].tolist() == [0.25, 0.75, 0]
    assert found.dense(3)[1, 0].tolist() == [0, 0, 1]
    assert found.dense(3).sum() == 2


def renormalised(dense):
    total = dense.sum(-1, keepdim=True)
    return torch.where(total > 0, dense / total.clamp_min(1e-300), 0), total[..., 0] > 0


@given(st.integers(0, 2**31), st.sampled_from([equal_taps, ragged]), st.sampled_from([equal_taps, ragged]))
@settings(max_examples=60, deadline=None)
def test_then_is_the_renormalised_matrix_product(seed, make, make_second):
    first, second = make(seed), make_second(seed + 1, t_time=TIME, time=4)
    both = first.then(second)
    wanted, valid = renormalised(matrix(second, TIME) @ matrix(first))
    assert torch.equal(both.valid, valid)
    torch.testing.assert_close(matrix(both), wanted, rtol=0, atol=1e-6)
    pairs = list(zip(both.rows.tolist(), both.index.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_then_after_and_before_the_identity():
    some, valid = ragged(3), torch.rand(BATCH, TIME) < 0.7
    same = TimeMap.same(valid)
    after = some.then(same)
    assert torch.equal(after.valid, some.valid & valid)
    torch.testing.assert_close(matrix(after), matrix(some) * valid[..., None])
    second = ragged(4, t_time=TIME)
    wanted, wanted_valid = renormalised(matrix(second, TIME) * valid[:, None].double())
    before = same.then(second)
    assert torch.equal(before.valid, wanted_valid)
    torch.testing.assert_close(matrix(before, TIME), wanted, rtol=0, atol=1e-6)
    assert same.then(same).identity


@MAPS
def test_no_teacher_positions_give_zeros(make):
    found = make().apply(cache()[:, :, :, :0])
    assert torch.equal(found, torch.zeros(BATCH, LAYER, HEAD, TIME, DIM, dtype=torch.float64))


def test_no_teacher_positions_are_an_empty_matrix():
    nowhere = TimeMap.gather(torch.zeros(BATCH, TIME).long(), torch.zeros(BATCH, TIME).bool())
    assert nowhere.dense(0).shape == (BATCH, TIME, 0)
    nothing = TimeMap.gather(torch.zeros(BATCH, 0).long(), torch.zeros(BATCH, 0).bool())
    assert not nothing.then(nowhere).valid.any()


def test_no_student_positions():
    nothing = TimeMap.gather(torch.zeros(BATCH, 0).long(), torch.zeros(BATCH, 0).bool())
    assert nothing.apply(cache()).shape == (BATCH, LAYER, HEAD, 0, DIM)
    assert nothing.taps == 0
    assert nothing.then(nothing).dense(3).shape == (BATCH, 0, 3)


def test_identity_returns_its_argument():
    x = cache()
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


def test_taps_is_the_rounded_up_mean():
    assert equal_taps(taps=3).taps == 3
    row, valid = torch.tensor([0, 0, 0, 2, 3]), torch.ones(2, 2, dtype=torch.bool)
    entries = TimeMap.of_entries(row, torch.arange(5), torch.ones(5), valid)
    assert entries.taps == 2


def test_the_batch_does_not_matter():
    time_map, x = ragged(5), cache()
    for b in range(BATCH):
        own = slice(*time_map.start[[b * TIME, (b + 1) * TIME]].tolist())
        start = time_map.start[b * TIME : (b + 1) * TIME + 1] - time_map.start[b * TIME]
        alone = TimeMap(time_map.index[own], time_map.weight[own], start, time_map.valid[b : b + 1])
        assert torch.equal(alone.apply(x[b : b + 1]), time_map.apply(x)[b : b + 1])


@MAPS
@LENGTHS
def test_meta_shapes(make, t_time):
    meta = make(t_time=t_time).to("meta")
    x = cache(t_time).to("meta").requires_grad_()
    found = meta.apply(x)
    assert found.shape == (BATCH, LAYER, HEAD, TIME, DIM)
    found.sum().backward()
    assert x.grad.shape == x.shape


def test_accelerate_moves_maps():
    moved = send_to_device({"map": TimeMap.same(torch.ones(1, 2).bool())}, "meta", non_blocking=True)["map"]
    assert moved.identity
    assert all(each.is_meta for each in (moved.index, moved.weight, moved.start, moved.valid))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned():
    pinned = ragged().pin_memory()
    assert all(each.is_pinned() for each in (pinned.index, pinned.weight, pinned.start, pinned.valid))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
def test_ranges_are_the_numbers_of_each(pairs):
    first, count = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    owner, value = expand_ranges(first, count)
    wanted = [(k, first + j) for k, (first, count) in enumerate(pairs) for j in range(count)]
    assert list(zip(owner.tolist(), value.tolist(), strict=True)) == wanted
