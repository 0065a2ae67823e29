"""Relations between positions: both forms against loops in float64, and memory linear in time."""

from __future__ import annotations

import pytest
import torch

from kava_core.errors import SpecError
from kava_core.protocols.axes import Cache, Geometry
from kava_core.testing import KVLossTests
from kava_plugins.kv_losses import RelationConfig, _row_blocks
from tests.plugins.kv_losses.attention_helpers import draw_weight

torch.set_num_threads(1)
BATCH, LAYER, TIME = 2, 2, 6
STUDENT = Geometry(layer=LAYER, head=2, dim=4, qhead=4, hidden=16)
TEACHER = Geometry(layer=LAYER, head=3, dim=8, qhead=3, hidden=24)
ALL = [
    RelationConfig(form=form, heads=heads, center=center, parts=("keys", "values", "queries"))
    for form in ("cosine", "softmax")
    for heads in ("merged", 4)
    for center in (True, False)
]
each_config = pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.form}-{c.heads}-{c.center}")


def build(config):
    return config.build(teacher=TEACHER, student=STUDENT)


def draw(geometry, seed, dtype=torch.float64, time=TIME):
    generator = torch.Generator().manual_seed(seed)
    heads = {"keys": geometry.head, "values": geometry.head, "queries": geometry.qhead}
    shapes = {part: (BATCH, LAYER, head, time, geometry.dim) for part, head in heads.items()}
    made = {part: torch.randn(shape, generator=generator).double() for part, shape in shapes.items()}
    return Cache(**made).map(lambda x, _: x.to(dtype).requires_grad_())


def sides(dtype=torch.float64, time=TIME):
    return draw(STUDENT, 0, dtype, time), draw(TEACHER, 1, dtype, time)


def slow_heads(x, valid, config):
    """For each relation head the positions' vectors, of one example and layer ``[head, time, dim]``."""
    merged = [torch.cat([x[h, j].double() for h in range(len(x))]) for j in range(x.shape[1])]
    if config.center:
        mean = torch.stack([merged[j] for j in valid]).mean(0)
        merged = [one - mean for one in merged]
    count = 1 if config.heads == "merged" else config.heads
    return [[one.chunk(count)[head] for one in merged] for head in range(count)]


def slow_row(mine, theirs, valid, i, form):
    if form == "cosine":
        cosines = [[x[i] @ x[j] / (x[i].norm() * x[j].norm()) for j in valid] for x in (mine, theirs)]
        return torch.stack([(a - b) ** 2 for a, b in zip(*cosines, strict=True)]).mean()
    rows = [
        torch.stack([x[i] @ x[j] / len(x[i]) ** 0.5 for j in valid]).log_softmax(0) for x in (mine, theirs)
    ]
    return (rows[1].exp() * (rows[1] - rows[0])).sum()


def slow_relation(config, student, target, weight):
    total = torch.zeros((), dtype=torch.float64)
    for part in config.parts:
        for b, layer, i in weight.nonzero().tolist():
            valid = weight[b, layer].nonzero().flatten().tolist()
            mine, theirs = (slow_heads(getattr(c, part)[b, layer], valid, config) for c in (student, target))
            each = [slow_row(*pair, valid, i, config.form) for pair in zip(mine, theirs, strict=True)]
            total = total + weight[b, layer, i] * torch.stack(each).mean()
    return total


def slopes(value, *caches):
    return torch.autograd.grad(value, [x for cache in caches for _, x in cache.items()])


@each_config
def test_value_and_gradients_are_the_loops(config):
    student, target = sides()
    weight = draw_weight(BATCH, LAYER, TIME)
    found, wanted = build(config)(student, target, weight), slow_relation(config, student, target, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(slopes(found, student, target), slopes(wanted, student, target), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_inputs(config, dtype):
    student, target = sides(dtype)
    weight = draw_weight(BATCH, LAYER, TIME)
    found, wanted = (
        build(config)(student, target, weight.float()),
        slow_relation(config, student, target, weight),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    for mine, theirs in zip(slopes(found, student), slopes(wanted, student), strict=True):
        assert (mine - theirs).norm() <= (1e-4 if dtype == torch.float32 else 8e-3) * theirs.norm()


@each_config
@pytest.mark.parametrize("junk", [float("nan"), 1e30])
def test_weight_0_has_no_influence(config, junk):
    student, target = sides()
    weight = draw_weight(BATCH, LAYER, TIME)
    weight[0, 1] = 0
    hole = (weight == 0)[:, :, None, :, None]
    dirty, bad = (c.map(lambda x, _: torch.where(hole, junk, x)) for c in (student, target))
    found, wanted = build(config)(dirty, bad, weight), build(config)(student, target, weight)
    assert torch.equal(found, wanted)
    for mine, theirs in zip(slopes(found, dirty, bad), slopes(wanted, student, target), strict=True):
        assert torch.equal(mine, torch.where(hole, 0, theirs))


@each_config
@pytest.mark.parametrize("time", [0, 1])
def test_few_positions(config, time):
    student, target = sides(time=time)
    found = build(config)(student, target, torch.ones(BATCH, LAYER, time))
    assert found == 0 or time == 1
    assert found.isfinite()
    assert all(x.isfinite().all() for x in slopes(found, student, target))


@each_config
def test_zero_vectors_have_finite_gradients(config):
    student, target = sides()
    zero = student.map(lambda x, _: torch.zeros_like(x).requires_grad_())
    found = build(config)(zero, target, torch.ones(BATCH, LAYER, TIME))
    assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in slopes(found, zero))


def test_heads_must_divide_both_widths():
    with pytest.raises(SpecError, match="heads 5 does not divide the student's values, all heads 8 wide"):
        build(RelationConfig(heads=5))
    with pytest.raises(SpecError, match="heads 16 does not divide the student's"):
        build(RelationConfig(heads=16))
    with pytest.raises(SpecError, match="heads 2 does not divide the target's values, all heads 9 wide"):
        RelationConfig(heads=2).build(teacher=TEACHER.with_(dim=3), student=STUDENT)


class Stored:
    """Elements of the tensors that autograd keeps for the backward pass."""

    def __enter__(self):
        self.elements = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _keep(self, x):
        self.elements += x.numel()
        return x


@pytest.mark.parametrize("form", ["cosine", "softmax"])
def test_what_is_kept_for_the_backward_pass_is_linear_in_time(form):
    kept = []
    for time in (200, 800):
        student, target = sides(torch.float32, time)
        with Stored() as stored:
            build(RelationConfig(form=form))(student, target, torch.ones(BATCH, LAYER, time))
        kept.append(stored.elements)
    assert 0 < kept[1] <= 4.05 * kept[0]


@pytest.mark.parametrize("form", ["cosine", "softmax"])
def test_blocks_change_nothing(form, monkeypatch):
    student, target = sides(time=50)
    weight, loss = draw_weight(BATCH, LAYER, 50), build(RelationConfig(form=form, heads=2))
    found = []
    for elements in (8, 2**20):
        monkeypatch.setitem(_row_blocks.ELEMENTS, "cpu", elements)
        monkeypatch.setitem(_row_blocks.PIECE, "cpu", elements)
        value = loss(student, target, weight)
        found.append((value, *torch.autograd.grad(value, (student.values, target.values))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


class TestKitOfRelation(KVLossTests):
    """The forms that are not the default; every geometry, with a target of its own heads and widths."""

    @pytest.fixture(
        params=[
            RelationConfig(form="softmax", parts=("keys", "queries")),
            RelationConfig(heads=1, center=False),
        ]
    )
    def config(self, request):
        return request.param
