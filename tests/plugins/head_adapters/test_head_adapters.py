"""Head adapters against loops over heads."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError

from kava_core.errors import KavaError
from kava_core.protocols.axes import Geometry
from kava_plugins.head_adapters import kava_head_adapters

torch.set_num_threads(1)
PAIRS = [(12, 2), (28, 4), (8, 32), (32, 8), (3, 5), (5, 3), (1, 4), (4, 1), (1, 1), (7, 7)]
BATCH, LAYER, TIME, DIM = 2, 3, 5, 4


def build(name, t_head, head, *, t_qhead=None, qhead=None, layer=LAYER, **fields):
    [declaration] = [one for one in kava_head_adapters() if one.component_name() == name]
    teacher = Geometry(layer=layer, head=t_head, dim=DIM, qhead=t_qhead or 2 * t_head, hidden=8)
    student = Geometry(layer=layer, head=head, dim=6, qhead=qhead or 3 * head, hidden=8)
    return declaration(**fields).build(teacher=teacher, student=student)


def slow_grouped(t_head, head):
    """Overlap of head i's share of the unit interval with teacher head j's, relative to head i's."""
    mix = torch.zeros(head, t_head, dtype=torch.float64)
    for i in range(head):
        for j in range(t_head):
            start = max(Fraction(i, head), Fraction(j, t_head))
            stop = min(Fraction(i + 1, head), Fraction(j + 1, t_head))
            mix[i, j] = float(max(stop - start, 0) * head)
    return mix


def slow_mix(x, mix):
    out = torch.zeros(BATCH, LAYER, mix.shape[-2], TIME, DIM, dtype=torch.float64)
    for layer in range(LAYER):
        for i in range(mix.shape[-2]):
            for j in range(x.shape[2]):
                out[:, layer, i] += mix[layer, i, j] * x[:, layer, j]
    return out


def draw(head):
    return torch.randn(BATCH, LAYER, head, TIME, DIM, dtype=torch.float64)


@pytest.mark.parametrize(("t_head", "head"), PAIRS)
def test_grouped_averages_neighbouring_heads(t_head, head):
    adapter, x = build("structured", t_head, head), draw(t_head)
    for part in ("keys", "values"):
        wanted = slow_mix(x, slow_grouped(t_head, head).expand(LAYER, -1, -1))
        torch.testing.assert_close(adapter(x, part), wanted, rtol=1e-6, atol=1e-6)
    queries = draw(2 * t_head)
    wanted = slow_mix(queries, slow_grouped(2 * t_head, 3 * head).expand(LAYER, -1, -1))
    torch.testing.assert_close(adapter(queries, "queries"), wanted, rtol=1e-6, atol=1e-6)


def test_uniform_averages_all_heads():
    x = draw(6)
    wanted = x.mean(2, keepdim=True).expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(
        build("structured", 6, 4, init="uniform")(x, "keys"), wanted, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_random_rows_are_means_and_follow_the_seed(per_layer, share_kv, trainable):
    fields = {"init": "random", "per_layer": per_layer, "share_kv": share_kv, "trainable": trainable}
    adapter = build("structured", 4, 3, seed=1, **fields)
    heads = torch.eye(4, dtype=torch.float64)[None, None, :, None].expand(1, LAYER, -1, 1, -1)
    mix = {part: adapter(heads, part)[0, :, :, 0] for part in ("keys", "values")}
    torch.testing.assert_close(mix["keys"].sum(-1), torch.ones(LAYER, 3).double(), rtol=1e-6, atol=0)
    assert mix["keys"].min() > 0
    assert torch.equal(mix["keys"], mix["values"]) is share_kv
    assert torch.equal(mix["keys"][0], mix["keys"][1]) is not per_layer
    x = draw(4)
    torch.testing.assert_close(adapter(x, "values"), slow_mix(x, mix["values"]))
    again, other = (build("structured", 4, 3, seed=seed, **fields) for seed in (1, 2))
    assert torch.equal(again(x, "keys"), adapter(x, "keys"))
    assert not torch.equal(other(x, "keys"), adapter(x, "keys"))
    assert bool(list(adapter.parameters())) is trainable


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_equal_heads_cost_nothing(share_kv, per_layer):
    adapter = build("structured", 4, 4, t_qhead=8, qhead=8, share_kv=share_kv, per_layer=per_layer)
    x, queries = draw(4), draw(8)
    assert adapter(x, "keys") is x
    assert adapter(x, "values") is x
    assert adapter(queries, "queries") is queries
    assert adapter.fold(x) is x
    assert not adapter.state_dict()


@pytest.mark.parametrize("init", ["grouped", "uniform", "random"])
def test_one_head_each_costs_nothing(init):
    """A mean of one head is that head, whatever the init."""
    adapter, x = build("structured", 1, 1, init=init), draw(1)
    assert adapter(x, "keys") is x
    assert adapter(x, "values") is x


def test_queries_are_mixed_where_only_their_counts_differ():
    adapter, x = build("structured", 4, 4, t_qhead=8, qhead=16), draw(4)
    assert adapter(x, "keys") is x
    assert adapter(draw(8), "queries").shape[2] == 16


def test_learning_rate_is_where_the_engine_looks():
    assert build("structured", 4, 2, trainable=True).learning_rate is None
    assert build("structured", 4, 2, trainable=True, learning_rate=1e-5).learning_rate == 1e-5
    with pytest.raises(ValidationError):
        build("structured", 4, 2, learning_rate=0)


def test_equal_heads_trained_start_as_the_identity():
    x = draw(4)
    assert torch.equal(build("structured", 4, 4, trainable=True)(x, "keys"), x)


def test_gradients_reach_input_and_mix():
    adapter, x = build("structured", 4, 3, trainable=True, per_layer=True).double(), draw(4).requires_grad_()
    upstream = torch.randn(BATCH, LAYER, 3, TIME, DIM, dtype=torch.float64)
    mix = adapter.keys_mix.detach().clone().requires_grad_()
    mine = torch.autograd.grad((adapter(x, "keys") * upstream).sum(), (x, adapter.keys_mix))
    theirs = torch.autograd.grad((slow_mix(x, mix) * upstream).sum(), (x, mix))
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_batch_and_its_padding_do_not_matter():
    adapter, x = build("structured", 12, 5), draw(12)
    whole = adapter(x, "keys")
    for b in range(BATCH):
        torch.testing.assert_close(adapter(x[b : b + 1], "keys"), whole[b : b + 1])
    padded = torch.cat([torch.full_like(x, 1e4), x], 3)
    torch.testing.assert_close(adapter(padded, "keys")[:, :, :, TIME:], whole)


def test_layers_do_not_see_each_other():
    adapter, x = build("structured", 4, 3, per_layer=True, init="random"), draw(4)
    changed = x.clone()
    changed[:, 0] += 1
    before, after = adapter(x, "keys"), adapter(changed, "keys")
    assert torch.equal(before[:, 1:], after[:, 1:])
    torch.testing.assert_close(after[:, 0], before[:, 0] + 1)  # rows sum to 1


def test_half_precision():
    adapter, x = build("structured", 12, 2), draw(12).bfloat16()
    wanted = slow_mix(x.double(), slow_grouped(12, 2).expand(LAYER, -1, -1))
    found = adapter(x, "keys")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("time", [0, 1])
def test_one_layer_one_head_and_hardly_any_time(time):
    x = torch.randn(1, 1, 1, time, DIM, requires_grad=True)
    found = build("structured", 1, 2, layer=1)(x, "keys")
    torch.testing.assert_close(found, x.expand(-1, -1, 2, -1, -1))
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert build("flat", 1, 2, layer=1)(x, "keys").shape == (1, 1, 1, time, DIM)
    assert build("flat", 1, 2, layer=1, layers=True)(x, "keys").shape == (1, 1, 1, time, DIM)


@pytest.mark.parametrize("init", ["grouped", "uniform", "random"])
def test_meta_shapes(init):
    with torch.device("meta"):
        adapter = build("structured", 4, 3, init=init)
        assert adapter(torch.empty(2, LAYER, 4, 5, DIM), "keys").shape == (2, LAYER, 3, 5, DIM)
        assert adapter(torch.empty(2, LAYER, 8, 5, DIM), "queries").shape == (2, LAYER, 9, 5, DIM)


def test_structured_views():
    adapter = build("structured", 4, 3)
    assert (adapter.teacher_view.head, adapter.teacher_view.qhead, adapter.teacher_view.dim) == (3, 9, DIM)
    assert (adapter.student_view.head, adapter.student_view.dim) == (3, 6)


def test_flat_puts_heads_side_by_side():
    adapter, x = build("flat", 3, 2), draw(3)
    assert (adapter.teacher_view.head, adapter.teacher_view.dim) == (1, 3 * DIM)
    assert (adapter.student_view.head, adapter.student_view.dim) == (1, 2 * 6)
    assert torch.equal(adapter(x, "keys")[:, :, 0], torch.cat([x[:, :, j] for j in range(3)], -1))
    student = torch.randn(BATCH, LAYER, 2, TIME, 6)
    assert torch.equal(adapter.fold(student)[:, :, 0], torch.cat([student[:, :, 0], student[:, :, 1]], -1))


def test_flat_puts_layers_side_by_side_too():
    adapter, x = build("flat", 3, 2, layers=True), draw(3)
    teacher, student = adapter.teacher_view, adapter.student_view
    assert (teacher.layer, teacher.head, teacher.dim) == (1, 1, LAYER * 3 * DIM)
    assert (student.layer, student.head, student.dim) == (1, 1, LAYER * 2 * 6)
    wanted = torch.cat([x[:, i, j] for i in range(LAYER) for j in range(3)], -1)
    assert torch.equal(adapter(x, "values")[:, 0, 0], wanted)
    own = torch.randn(BATCH, LAYER, 2, TIME, 6)
    wanted = torch.cat([own[:, i, j] for i in range(LAYER) for j in range(2)], -1)
    assert torch.equal(adapter.fold(own)[:, 0, 0], wanted)


@pytest.mark.parametrize("layers", [False, True])
def test_flat_keeps_every_number_and_its_gradient(layers):
    adapter, x = build("flat", 3, 2, layers=layers), draw(3).requires_grad_()
    found = adapter(x, "keys")
    torch.testing.assert_close(found.square().sum((1, 2, 4)), x.square().sum((1, 2, 4)))
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)


@pytest.mark.parametrize("layers", [False, True])
def test_flat_refuses_queries(layers):
    with pytest.raises(KavaError) as caught:
        build("flat", 3, 2, layers=layers)(draw(6), "queries")
    assert str(caught.value) == "head_adapter flat: queries cannot be flattened; possible parts: keys, values"
