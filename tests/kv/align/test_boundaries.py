"""The borders between components: what a broken component is told, and the arithmetic of fusing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kava_core.errors import PluginError
from kava_core.kv.align import boundaries as stages
from kava_core.protocols.axes import Cache
from kava_core.protocols.fuser import FusionContext
from kava_core.protocols.time_map import TimeMap
from tests.support.pipeline_helpers import DEEP, STUDENT, Module, timeline


def context(valid: Tensor) -> FusionContext:
    empty = Cache(keys=torch.zeros(valid.shape[1], 2, 1, valid.shape[2], 1, dtype=torch.float64))
    return FusionContext(valid, (empty,) * valid.shape[0], empty)


def blamed(call: Any, *arguments: Any, told: str = "^returned .*must be", **named: Any) -> list[str]:
    """The notes of the error that a border raises, alike in debug mode and without."""
    with (
        pytest.raises(PluginError, match=told) as caught,
        stages.attribute_errors_to("kind 'fake', teacher 'a'"),
    ):
        call(*arguments, **named)
    return caught.value.__notes__


def adapter(function: Any) -> Module:
    """A head adapter that maps and folds by one function."""
    module = Module(function)
    module.fold = lambda x: function(x, "keys")  # type: ignore[assignment]
    module.teacher_view, module.student_view = DEEP, STUDENT  # type: ignore[assignment]
    return module


NOTE = "in kind 'fake', teacher 'a'"
LAYER = 3
X = torch.zeros(2, LAYER, 4, 5, 6)


@pytest.mark.parametrize(
    "returned", [X[:, 1:], X[:, :, :3], X[:, :, :2, 1:], X[:, :, :2, :, 1:], X[0], X[:, :, :2].int(), None]
)
def test_adapter_of_wrong_extents(returned: Tensor | None) -> None:
    """Two heads of width 6 are wanted; layers and time must stay."""
    assert NOTE in blamed(
        stages.adapt_heads, adapter(lambda x, part: returned), X, "keys", layer=LAYER, head=2, dim=6
    )


@pytest.mark.parametrize("returned", [X[..., :4], X[..., 1:, :3], X[:, :, 1:, :, :3]])
def test_projector_of_wrong_extents(returned: Tensor) -> None:
    assert NOTE in blamed(stages.project_dim, Module(lambda x, part: returned), X, "keys", dim=3)


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (3, 2), (2,)])
def test_mapper_of_wrong_extents(shape: tuple[int, ...]) -> None:
    mapper = Module(lambda: torch.ones(shape))
    assert NOTE in blamed(stages.layer_matrix, mapper, teacher=DEEP, student=STUDENT)


@pytest.mark.parametrize("returned", [X[:, :, :3], X[..., 1:], X[:, :, :2, 1:], X[:, 1:, :2]])
def test_fold_of_wrong_extents(returned: Tensor) -> None:
    assert NOTE in blamed(stages.fold_heads, adapter(lambda x, part: returned), X, layer=LAYER, head=2, dim=6)


def test_adapter_of_right_extents() -> None:
    right = adapter(lambda x, part: x[:, :, :2])
    assert torch.equal(stages.adapt_heads(right, X, "keys", layer=LAYER, head=2, dim=6), X[:, :, :2])
    assert torch.equal(stages.fold_heads(right, X, layer=LAYER, head=2, dim=6), X[:, :, :2])


@pytest.mark.parametrize("valid", [torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)])
def test_warper_of_wrong_extents(valid: Tensor) -> None:
    warper = Module(lambda teacher, student: TimeMap.same(valid))
    theirs, ours = timeline((1, 2, 1), (1, 1, 1)), timeline((2, 2, 1), (1, 1, 1))
    assert NOTE in blamed(
        stages.plan_time, warper, theirs, ours, told="^valid of the TimeMap: returned shape .* must be"
    )


def test_warper_that_returns_a_tensor() -> None:
    warper = Module(lambda teacher, student: student.mask)
    ours, theirs = timeline((2, 2, 1)), timeline((1, 2, 1))
    assert NOTE in blamed(stages.plan_time, warper, theirs, ours, told="must return a TimeMap, not Tensor")


def test_identity_map_between_unequal_lengths() -> None:
    time_map = TimeMap.same(torch.ones(2, 4, dtype=torch.bool))
    assert NOTE in blamed(stages.warp_time, time_map, X, time=4)


@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 2, 2, 4), (2, 2, 1, 4)])
def test_fuser_of_wrong_extents(shape: tuple[int, ...]) -> None:
    valid = torch.ones(2, 2, 4, dtype=torch.bool)
    fuser = Module(lambda c: torch.ones(shape))
    assert NOTE in blamed(
        stages.teacher_weights,
        fuser,
        context(valid),
        valid,
        layer=2,
    )


@pytest.mark.parametrize("returned", [torch.zeros(1), torch.zeros(2, 3), torch.tensor(1), 0.0])
def test_loss_that_is_no_scalar(returned: object) -> None:
    loss = Module(lambda student, target, weight: returned)
    assert NOTE in blamed(stages.summed_loss, loss, Cache(keys=X), Cache(keys=X), torch.ones(2, 3, 5))


def test_blame_notes_every_level() -> None:
    with (
        pytest.raises(ZeroDivisionError) as caught,
        stages.attribute_errors_to("outer"),
        stages.attribute_errors_to("inner"),
    ):
        1 / 0  # noqa: B018
    assert caught.value.__notes__ == ["in inner", "in outer"]


def test_mix_layers_against_loops() -> None:
    x, matrix = torch.randn(2, 3, 2, 4, 5).double(), torch.rand(2, 3).double()
    mixed = stages.mix_layers(x, matrix)
    for i in range(2):
        by_hand = sum(matrix[i, j] * x[:, j] for j in range(3))
        torch.testing.assert_close(mixed[:, i], by_hand)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_weights_are_renormalised_over_the_valid(seed: int, teacher: int, batch: int, time: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(teacher, batch, 2, time, generator=generator).double()
    raw = torch.where(torch.rand(raw.shape, generator=generator) < 0.2, 0, raw)
    valid = torch.rand(teacher, batch, time, generator=generator) < 0.6
    weights = stages.teacher_weights(Module(lambda c: raw), context(valid), valid, layer=2)
    for b in range(batch):
        for i in range(2):
            for t in range(time):
                kept = [float(raw[n, b, i, t]) if valid[n, b, t] else 0.0 for n in range(teacher)]
                wanted = [w / sum(kept) if sum(kept) else 0.0 for w in kept]
                assert weights[:, b, i, t].tolist() == pytest.approx(wanted, abs=1e-12)


def test_weight_of_an_invalid_teacher_may_be_nan() -> None:
    valid = torch.tensor([[[True, True]], [[True, False]]])
    raw = torch.ones(2, 1, 2, 2)
    raw[1, :, :, 1] = torch.nan
    weights = stages.teacher_weights(Module(lambda c: raw), context(valid), valid, layer=2)
    assert weights[:, 0, 0].tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_fuse_against_loops() -> None:
    targets, weights = torch.randn(3, 2, 2, 3, 4, 5).double(), torch.rand(3, 2, 2, 4).double()
    fused = stages.fuse_targets(targets, weights)
    for b in range(2):
        for i in range(2):
            for t in range(4):
                by_hand = sum(float(weights[n, b, i, t]) * targets[n, b, i, :, t] for n in range(3))
                torch.testing.assert_close(fused[b, i, :, t], by_hand)


def test_nan_at_weight_zero_reaches_neither_target_nor_gradient() -> None:
    targets = torch.randn(2, 1, 1, 1, 2, 3).double()
    targets[1, ..., 1, :] = torch.nan
    targets.requires_grad_()
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).double().view(2, 1, 1, 2).requires_grad_()
    fused = stages.fuse_targets(targets, weights)
    torch.testing.assert_close(fused[0, 0, 0, 1], targets[0, 0, 0, 0, 1].detach())
    fused.sum().backward()
    assert targets.grad is not None
    assert weights.grad is not None
    assert targets.grad[1, ..., 1, :].tolist() == [[[[0.0] * 3]]]
    assert bool(targets.grad.isfinite().all())
    assert bool(weights.grad.isfinite().all())
