"""Every loss against loops over examples, layers, heads and positions in float64."""

from __future__ import annotations

import pytest
import torch

from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import kava_kv_losses

torch.set_num_threads(1)
BATCH, LAYER, HEAD, TIME, DIM = 3, 2, 2, 6, 4
GEOMETRY = Geometry(layer=LAYER, head=HEAD, dim=DIM, qhead=2 * HEAD, hidden=8)
ALL = [
    ("mse", {}),
    ("mse", {"scale": "batch"}),
    ("mse", {"scale": "example"}),
    ("smooth_l1", {}),
    ("smooth_l1", {"beta": 0.3, "scale": "batch"}),
    ("smooth_l1", {"scale": "example"}),
    ("mercator", {}),
    ("relation", {}),
    ("relation", {"center": False}),
]
FREE_OF_BATCH = [(name, fields) for name, fields in ALL if fields.get("scale") != "batch"]
each_loss = pytest.mark.parametrize(("name", "fields"), ALL)


def build(name, **fields):
    [declaration] = [one for one in kava_kv_losses() if one.component_name() == name]
    return declaration(**fields).build(teacher=GEOMETRY, student=GEOMETRY)


def draw(seed=0, shape=(BATCH, LAYER, HEAD, TIME, DIM), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    return Cache(keys, values)


def draw_weight(seed=7):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(BATCH, LAYER, TIME, dtype=torch.float64, generator=generator)
    return weight * (torch.rand(BATCH, LAYER, TIME, generator=generator) < 0.7)


def slow_std(target, weight, b, layer, scale):
    if scale == "none":
        return 1.0
    examples = range(len(target)) if scale == "batch" else [b]
    rows = [
        target[e, layer, :, i] for e in examples for i in range(weight.shape[2]) if weight[e, layer, i] > 0
    ]
    return torch.stack(rows).detach().std(correction=0)


def slow_position(name, fields, s, t, valid, i):
    """Loss of position i of one example and layer; ``s`` and ``t`` are ``[head, time, dim]``."""
    if name == "relation":
        return slow_relation(s, t, valid, i, center=fields.get("center", True))
    total = 0
    for h in range(len(s)):
        a, b = s[h, i], t[h, i]
        if name == "mercator":
            total = total + 1 - (a @ b) / (a.norm() * b.norm())
        elif name == "mse":
            total = total + ((a - b) ** 2).mean()
        else:
            beta, gap = fields.get("beta", 1.0), (a - b).abs()
            total = total + torch.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2).mean()
    return total / len(s)


def slow_relation(s, t, valid, i, *, center):
    merged = [torch.stack([torch.cat(list(x[:, j])) for j in range(x.shape[1])]) for x in (s, t)]
    if center:
        merged = [x - x[valid].mean(0) for x in merged]
    total = 0
    for j in valid:
        mine, theirs = (x[i] @ x[j] / (x[i].norm() * x[j].norm()) for x in merged)
        total = total + (mine - theirs) ** 2
    return total / len(valid)


def slow_loss(name, fields, student, target, weight, parts):
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        s, t = getattr(student, part), getattr(target, part)
        for b in range(weight.shape[0]):
            for layer in range(weight.shape[1]):
                valid = [i for i in range(weight.shape[2]) if weight[b, layer, i] > 0]
                for i in valid:
                    std = slow_std(t, weight, b, layer, fields.get("scale", "none"))
                    one = slow_position(name, fields, s[b, layer] / std, t[b, layer] / std, valid, i)
                    total = total + weight[b, layer, i] * one
    return total


def gradients(value, *caches):
    tensors = [x for cache in caches for _, x in cache.items()]
    return torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)


def tracked(cache):
    return cache.map(lambda x, _: x.detach().clone().requires_grad_())


@each_loss
@pytest.mark.parametrize("parts", [("keys",), ("values",), ("keys", "values")])
def test_value_and_gradient_are_the_loops(name, fields, parts):
    student, target, weight = tracked(draw(0)), tracked(draw(1)), draw_weight()
    found = build(name, parts=parts, **fields)(student, target, weight)
    wanted = slow_loss(name, fields, student, target, weight, parts)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(
        gradients(found, student, target), gradients(wanted, student, target), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@each_loss
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_lower_precision_inputs(name, fields, dtype, close):
    student, target, weight = draw(0, dtype=dtype), draw(1, dtype=dtype), draw_weight()
    found = build(name, **fields)(tracked(student), target, weight.float())
    wide = [cache.map(lambda x, _: x.double()) for cache in (student, target)]
    wanted = slow_loss(name, fields, *wide, weight, build(name, **fields).parts)
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=0)


@each_loss
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_weight_zero_has_no_influence(name, fields, junk):
    student, target, weight = draw(0), draw(1), draw_weight()
    hole = (weight == 0)[:, :, None, :, None]
    loss = build(name, parts=("keys", "values"), **fields)
    clean = tracked(student)
    wanted = loss(clean, target, weight)
    dirty, bad = (tracked(cache.map(lambda x, _: torch.where(hole, junk, x))) for cache in (student, target))
    found = loss(dirty, bad, weight)
    assert torch.equal(found, wanted)
    for mine, theirs in zip(gradients(found, dirty), gradients(wanted, clean), strict=True):
        assert torch.equal(mine, theirs)
    for gradient in gradients(loss(dirty, bad, weight), dirty, bad):
        assert not torch.where(hole, gradient, 0).any()
        assert gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("junk", [1.0, float("nan")])
def test_nothing_valid_is_exactly_zero(name, fields, junk):
    student, target = (tracked(draw(seed).map(lambda x, _: x * junk)) for seed in (0, 1))
    found = build(name, **fields)(student, target, torch.zeros(BATCH, LAYER, TIME, dtype=torch.float64))
    assert found == 0
    for gradient in gradients(found, student, target):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("name", "fields"), FREE_OF_BATCH)
def test_examples_add_up(name, fields):
    student, target, weight, loss = draw(0), draw(1), draw_weight(), build(name, **fields)
    parts = [
        loss(*(c.map(lambda x, _, s=s: x[s]) for c in (student, target)), weight[s])
        for s in (slice(1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss(student, target, weight))


@each_loss
def test_padding_changes_nothing(name, fields):
    student, target, weight, loss = draw(0), draw(1), draw_weight(), build(name, **fields)
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 3, 2), value=1.7)  # noqa: E731
    wide = [cache.map(lambda x, _: pad(x)) for cache in (student, target)]
    found = loss(*wide, torch.nn.functional.pad(weight, (3, 2)))
    torch.testing.assert_close(found, loss(student, target, weight))


@each_loss
def test_weights_multiply(name, fields):
    student, target, weight, loss = draw(0), draw(1), draw_weight(), build(name, **fields)
    torch.testing.assert_close(loss(student, target, 3 * weight), 3 * loss(student, target, weight))


@each_loss
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 1, 3, 2), (1, 2, 1, 0, 3)])
def test_small_extents(name, fields, shape):
    student, target = tracked(draw(0, shape)), draw(1, shape)
    weight = torch.ones(shape[0], shape[1], shape[3], dtype=torch.float64)
    found = build(name, **fields)(student, target, weight)
    assert found.shape == ()
    assert all(gradient.isfinite().all() for gradient in (found, *gradients(found, student)))


@each_loss
def test_equal_caches_have_no_loss(name, fields):
    student = tracked(draw(0))
    found = build(name, **fields)(student, draw(0), draw_weight())
    assert found.abs() < 1e-12
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(found, student))


@each_loss
def test_zero_vectors_and_constant_targets_give_finite_gradients(name, fields):
    student, target, weight = tracked(draw(0)), draw(1), torch.ones(BATCH, LAYER, TIME, dtype=torch.float64)
    with torch.no_grad():
        for _, x in student.items():
            x[:, :, :, 1:3] = 0
        for _, x in target.items():
            x[:, :, :, 2:4] = 0
            x[0] = 0.7
            x[1] = 0
    found = build(name, **fields)(student, target, weight)
    assert found.isfinite()
    assert all(
        gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in gradients(found, student)
    )


def test_mercator_of_zero_vectors_is_zero():
    zero, some = (
        Cache(*(x.expand(1, 1, 1, 2, 3).clone() for x in pair))
        for pair in (torch.zeros(2, 1), torch.ones(2, 1))
    )
    for student, target in ((zero, some), (some, zero), (zero, zero)):
        student = tracked(student)
        found = build("mercator")(student, target, torch.ones(1, 1, 2))
        assert found == 0
        assert not any(gradient.any() for gradient in gradients(found, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mercator_is_precise_near_zero(dtype):
    """At 1 − cos = 1e-3 the naive bfloat16 loss is 20 % wrong."""
    target = draw(1, (2, 1, 1, 500, 64))
    noise = draw(2, (2, 1, 1, 500, 64))
    student = Cache(target.keys + 0.045 * noise.keys, target.values + 0.045 * noise.values)
    student, target = (cache.map(lambda x, _: x.to(dtype)) for cache in (student, target))
    weight = torch.full((2, 1, 500), 1 / 2000)
    found = build("mercator")(student, target, weight)
    cosines = [
        torch.nn.functional.cosine_similarity(
            getattr(student, p).double(), getattr(target, p).double(), dim=-1
        )
        for p in ("keys", "values")
    ]
    wanted = (1 - torch.stack(cosines)).mean()
    assert 5e-4 < wanted < 2e-3
    assert abs(found.double() / wanted - 1) < 1e-4


def test_relation_needs_no_common_basis():
    target, weight, loss = draw(1), draw_weight(), build("relation")
    turn = torch.linalg.qr(torch.randn(HEAD * DIM, HEAD * DIM).double())[0]
    merged = target.values.permute(0, 1, 3, 2, 4).flatten(3) @ turn * 3 + 5
    student = Cache(values=merged.unflatten(-1, (4, 2)).permute(0, 1, 3, 2, 4))
    assert loss(student, target, weight) < 1e-20
    narrow = tracked(Cache(values=draw(2, (BATCH, LAYER, 1, TIME, 3)).values))
    found = loss(narrow, target, weight)
    wanted = slow_loss("relation", {}, narrow, target, weight, ("values",))
    torch.testing.assert_close(found, wanted)


def test_relation_of_equal_positions_ignores_rounding():
    """Positions that agree up to rounding have no direction after centring; their noise must not count."""
    values = torch.full((1, 1, 2, 7, 4), 0.1) * torch.rand(1, 1, 2, 1, 4)
    student = tracked(Cache(values=values))
    found = build("relation")(student, Cache(values=torch.randn(1, 1, 2, 7, 4)), torch.ones(1, 1, 7))
    assert not any(gradient.any() for gradient in gradients(found, student))


def test_relation_over_several_blocks_of_positions():
    student, target = draw(0, (1, 1, 1, 530, 2)), draw(1, (1, 1, 1, 530, 2))
    weight = torch.rand(1, 1, 530, dtype=torch.float64)
    grams = []
    for cache in (student, target):
        x = cache.values[0, 0, 0]
        x = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
        grams.append(x @ x.T)
    wanted = ((grams[0] - grams[1]).square().mean(1) * weight[0, 0]).sum()
    torch.testing.assert_close(build("relation")(student, target, weight), wanted)


def test_relation_stays_in_float32_under_autocast():
    student, target, weight = (
        draw(0, dtype=torch.float32),
        draw(1, dtype=torch.float32),
        draw_weight().float(),
    )
    wanted = build("relation")(student, target, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(build("relation")(student, target, weight), wanted)


@each_loss
def test_queries_too(name, fields):
    student, target = (Cache(queries=draw(seed, (BATCH, LAYER, 4, TIME, DIM)).keys) for seed in (0, 1))
    weight = draw_weight()
    found = build(name, parts=("queries",), **fields)(student, target, weight)
    torch.testing.assert_close(found, slow_loss(name, fields, student, target, weight, ("queries",)))


@each_loss
def test_meta_shapes(name, fields):
    student, target = (draw(seed).map(lambda x, _: x.to("meta")) for seed in (0, 1))
    found = build(name, **fields)(student, target, draw_weight().to("meta"))
    assert found.shape == ()
