"""Routers against their formulas spelled out with loops in float64; how the rewarded one learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.errors import KavaError, SpecError
from kava_core.kv.align.boundaries import teacher_weights
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import kava_fusers
from kava_plugins.fusers._routing import load_imbalance, negative_entropy

GEOMETRY = Geometry(layer=2, head=2, dim=3, qhead=2, hidden=5)
NAMES = ("ada", "bob", "cleo")
BATCH, TIME = 2, 4
DECLARED = {one.component_name(): one for one in kava_fusers()}


def build(name: str, teachers: tuple[str, ...] = NAMES, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = DECLARED[name](**fields).build(teachers=teachers, student=GEOMETRY)
    return made.double()


def randomised(module: nn.Module) -> nn.Module:
    """Weights that do not begin alike."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def context(tasks: tuple[str, ...] | None = None, seed: int = 0) -> FusionContext:
    """The first teacher has no target at the last position, none has one at position 1 of example 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Cache:
        shape = (BATCH, GEOMETRY.layer, GEOMETRY.head, TIME, GEOMETRY.dim)
        return Cache(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))

    valid = torch.ones(len(NAMES), BATCH, TIME, dtype=torch.bool)
    valid[0, :, -1] = valid[:, 0, 1] = False
    hidden = torch.randn(BATCH, TIME, GEOMETRY.hidden, generator=generator, dtype=torch.float64)
    return FusionContext(valid, tuple(draw() for _ in NAMES), draw(), hidden, tasks)


def softmax(scores: list[float], valid: list[bool]) -> list[float]:
    exps = [math.exp(score) if there else 0.0 for score, there in zip(scores, valid, strict=True)]
    return [each / sum(exps) for each in exps] if any(valid) else exps


def each_place() -> list[tuple[int, int, int]]:
    return [(b, i, t) for b in range(BATCH) for i in range(GEOMETRY.layer) for t in range(TIME)]


def compare(weights: Tensor, seen: FusionContext, score: Any) -> None:
    """``score(teacher, example, layer, position)`` through a softmax by hand."""
    for b, i, t in each_place():
        valid = seen.valid[:, b, t].tolist()
        wanted = softmax([score(k, b, i, t) for k in range(len(NAMES))], valid)
        assert weights[:, b, i, t].tolist() == pytest.approx(wanted, abs=1e-6)


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


@pytest.mark.parametrize("per", ["token", "example"])
def test_similarity_is_a_softmax_of_cosines_to_mean_caches(per: str) -> None:
    fuser, seen = build("similarity", temperature=0.3, per=per), [context(seed=1), context(seed=2)]
    for one in seen:
        fuser.observe(one)
    fuser.finish()
    now = context(seed=3)
    weights = fuser(now)

    def prototype(k: int, i: int) -> Tensor:
        rows = [
            one.targets[k].keys[b, i, :, t].flatten()
            for one in seen
            for b in range(BATCH)
            for t in range(TIME)
            if one.valid[k, b, t]
        ]
        return torch.stack(rows).mean(0)

    def query(b: int, i: int, t: int) -> Tensor:
        if per == "token":
            return now.student.keys[b, i, :, t].flatten()
        kept = [u for u in range(TIME) if now.valid[:, b, u].any()]
        return torch.stack([now.student.keys[b, i, :, u].flatten() for u in kept]).mean(0)

    compare(weights, now, lambda k, b, i, t: float(unit(query(b, i, t)) @ unit(prototype(k, i))) / 0.3)


def test_similarity_wants_to_see_data_first() -> None:
    with pytest.raises(KavaError, match="used before calibration"):
        build("similarity")(context())


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("per", ["token", "example"])
def test_learnable_is_a_small_network_on_the_hidden_state(per: str, per_layer: bool) -> None:
    fuser, seen = randomised(build("learnable", per=per, per_layer=per_layer, temperature=2.0)), context()
    weights = fuser(seen)

    def score(k: int, b: int, i: int, t: int) -> float:
        kept = [u for u in range(TIME) if seen.valid[:, b, u].any()]
        h = seen.hidden[b, t] if per == "token" else seen.hidden[b, kept].mean(0)
        inner = fuser.inner.weight @ h + fuser.inner.bias
        outer = fuser.outer.weight @ (inner * torch.sigmoid(inner)) + fuser.outer.bias
        row = k * GEOMETRY.layer + i if per_layer else k
        return float(outer[row]) / 2.0

    compare(weights, seen, score)


def test_attention_scores_teachers_by_query_and_key() -> None:
    fuser, seen = randomised(build("attention", width=7)), context()
    weights = fuser(seen)

    def score(k: int, b: int, i: int, t: int) -> float:
        query = fuser.query.weight @ seen.hidden[b, t]
        key = fuser.key.weight @ seen.targets[k].keys[b, i, :, t].flatten()
        return float(query @ key) / math.sqrt(7)

    compare(weights, seen, score)


@pytest.mark.parametrize("name", ["learnable", "attention"])
def test_routers_begin_undecided_and_their_gradient_is_right(name: str) -> None:
    seen = context()
    there = seen.valid[:, :, None].double()
    even = torch.where(there.sum(0) > 0, there / there.sum(0).clamp_min(1), 0)
    torch.testing.assert_close(build(name)(seen).double(), even.expand(-1, -1, 2, -1), atol=1e-6, rtol=0)
    fuser = randomised(build(name, width=3))
    names = [one for one, _ in fuser.named_parameters()]

    def value(*parameters: Tensor) -> Tensor:
        weights = torch.func.functional_call(fuser, dict(zip(names, parameters, strict=True)), (seen,))
        return (weights.double() * torch.linspace(0, 1, weights.numel()).view_as(weights)).sum()

    step = 1e-4
    for place, parameter in enumerate(fuser.parameters()):
        gradient = torch.autograd.grad(value(*fuser.parameters()), parameter)[0]
        shifted = [list(fuser.parameters()) for _ in range(2)]
        direction = torch.randn_like(parameter)
        for sign, arguments in zip((1, -1), shifted, strict=True):
            arguments[place] = (parameter + sign * step * direction).detach()
        slope = (value(*shifted[0]) - value(*shifted[1])) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=2e-3)


def test_tasks_have_their_own_weights() -> None:
    weights = {"math": {"ada": 1, "bob": 0, "cleo": 3}, "code": {"ada": 0, "bob": 1, "cleo": 0}}
    fuser = build("task", weights=weights, default={"ada": 0, "bob": 0, "cleo": 1})
    found = fuser(context(("code", "math")))
    assert found[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert found[:, 1, 1, 2].tolist() == [1, 0, 3]
    unknown = fuser(context(("poetry", "")))
    assert unknown[:, 0, 0, 0].tolist() == unknown[:, 1, 0, 0].tolist() == [0, 0, 1]
    assert build("task", weights=weights)(context()).eq(1).all()


def test_tasks_name_their_teachers_rightly() -> None:
    with pytest.raises(SpecError, match=r"fuser task: weights: no teacher 'boob'.*did you mean 'bob'"):
        build("task", weights={"math": {"ada": 1, "boob": 0, "cleo": 3}})


def test_penalties_against_loops() -> None:
    weights = torch.rand(3, BATCH, 2, TIME, dtype=torch.float64)
    weights = weights / weights.sum(0)
    weights[:, 0, :, 1] = 0
    entropy, shares, count = 0.0, [0.0] * 3, 0
    for b, i, t in each_place():
        each = weights[:, b, i, t].tolist()
        count += sum(each) > 0
        entropy += sum(w * math.log(w) for w in each if w > 0) / 2
        shares = [share + w for share, w in zip(shares, each, strict=True)]
    assert float(negative_entropy(weights)) == pytest.approx(entropy)
    squares = sum((share / count) ** 2 for share in shares)
    assert float(load_imbalance(weights)) == pytest.approx((3 * squares - 1) * count / 2)
    assert float(load_imbalance(torch.full((3, 1, 1, 5), 1 / 3))) == pytest.approx(0, abs=1e-5)


def test_some_teachers_are_drawn_in_proportion_to_their_weights() -> None:
    fuser = build("fixed", weights={"ada": 3, "bob": 1, "cleo": 0}, sample=1).train()
    torch.manual_seed(0)
    drawn = torch.stack([fuser.choose().clone() for _ in range(400)]).double()
    assert drawn.sum(1).eq(1).all()
    assert drawn.mean(0).tolist() == pytest.approx([0.75, 0.25, 0.0], abs=0.07)
    assert fuser(context())[:, 0, 0, 0].count_nonzero() == 1
    assert fuser.eval().choose().tolist() == [True, True, False]  # a weight of 0 is no reason to run
    with pytest.raises(SpecError, match="sample: 3 of 2 teachers"):
        build("fixed", weights={"ada": 3, "bob": 1, "cleo": 0}, sample=3)


def test_a_policy_moves_to_the_teacher_whose_steps_pay() -> None:
    """A bandit: after teacher b the loss falls by 1, after the others it stays; it starts at even chances."""
    fuser = build("reinforce", entropy=0.0).train()
    optimizer, loss, last = torch.optim.SGD(fuser.parameters(), lr=0.2), 100.0, None
    torch.manual_seed(0)
    for _ in range(200):
        chosen = int(fuser.choose().nonzero())
        weights = fuser(context())
        assert weights[chosen].eq(1).all()
        optimizer.zero_grad()
        (fuser.penalty(torch.full((3, 1, 1, 1), 1 / 3, dtype=torch.float64))).backward()
        optimizer.step()
        loss -= 1.0 if last == 1 else 0.0
        fuser.reward(torch.tensor(loss, dtype=torch.float64))
        last = chosen
    chances = fuser.eval()(context())[:, 0, 0, 0]
    assert chances.argmax() == 1
    assert chances[1] > 0.8


def test_the_first_reward_has_nothing_to_compare_with() -> None:
    fuser = build("reinforce", entropy=0.0).train()
    for loss in (5.0, 3.0):
        fuser.choose()
        fuser.reward(torch.tensor(loss, dtype=torch.float64))
    assert float(fuser.advantage) == 0
    fuser.reward(torch.tensor(3.0, dtype=torch.float64))
    assert float(fuser.advantage) == pytest.approx(0 - 2.0)
    assert float(fuser.baseline) == pytest.approx(0.9 * 2.0)


@pytest.mark.parametrize("name", ["learnable", "attention"])
@pytest.mark.parametrize("entropy", [0.0, 0.5])
def test_a_router_that_is_certain_has_a_finite_gradient(name: str, entropy: float) -> None:
    """A weight that underflows to 0 has an infinite slope of its entropy; float32, as in training."""
    fuser = randomised(build(name, entropy=entropy, balance=entropy)).float()
    if name == "learnable":
        fuser.outer.bias.data = torch.tensor([300.0, 0.0, -300.0]).repeat_interleave(fuser.layers)
    else:
        fuser.query.weight.data *= 1e3
    seen = context()
    seen = replace(
        seen,
        hidden=seen.hidden.float(),
        targets=tuple(one.map(lambda x, _: x.float()) for one in seen.targets),
        student=seen.student.map(lambda x, _: x.float()),
    )
    weights = teacher_weights(fuser, seen, seen.valid, layer=GEOMETRY.layer)
    assert (weights[:, 0, :, 0] == 0).any()  # valid everywhere there, and certain
    loss = fuser.penalty(weights) + (weights * torch.arange(3.0)[:, None, None, None]).sum()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in fuser.parameters())


def test_a_certain_policy_has_a_finite_gradient() -> None:
    fuser = build("reinforce").train().float()
    fuser.logits.data = torch.tensor([500.0, 0.0, -500.0])
    fuser.penalty(torch.full((3, 1, 1, 1), 1 / 3)).backward()
    assert torch.isfinite(fuser.logits.grad).all()
