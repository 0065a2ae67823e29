"""The space of canonical correlations against SciPy and loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import SharedSpaceConfig
from kava_plugins.kv_losses.shared_space import orthonormal_columns, whitening_matrix

torch.set_num_threads(1)
STUDENT = Geometry(layer=2, head=2, dim=3, qhead=4, hidden=8)
TARGET = Geometry(layer=2, head=1, dim=4, qhead=2, hidden=8)
BATCH, TIME = 5, 30


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides() -> tuple[Cache, Cache, Tensor]:
    """Two caches with a common cause, far from the origin; some positions are not valid."""
    cause = draw(0, BATCH, 2, TIME, 2)
    mine = cause @ draw(1, 2, 6) + 0.3 * draw(2, BATCH, 2, TIME, 6) + 40
    theirs = cause @ draw(3, 2, 4) + 0.3 * draw(4, BATCH, 2, TIME, 4) - 7
    valid = torch.rand(BATCH, TIME, generator=torch.Generator().manual_seed(5)) < 0.8
    student = mine.unflatten(-1, (2, 3)).movedim(3, 2)
    return Cache(values=student), Cache(values=theirs[:, :, None]), valid


def fitted(**fields: object) -> tuple[torch.nn.Module, Cache, Cache, Tensor]:
    student, target, valid = sides()
    loss = SharedSpaceConfig(**fields).build(teacher=TARGET, student=STUDENT).double()
    for some in (slice(0, 3), slice(3, BATCH)):
        loss.observe(*(c.map(lambda x, _: x[some]) for c in (student, target)), valid[some])  # noqa: B023
    loss.finish()
    return loss, student, target, valid


def rows(cache: Cache, layer: int, where: Tensor) -> np.ndarray:
    return cache.any[:, layer].movedim(1, 2).flatten(2)[where].numpy()


def halves(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Directions are computed from even examples, correlations from odd ones."""
    odd = (torch.arange(len(valid)) % 2 == 1)[:, None]
    return valid & ~odd, valid & odd


def reference(layer: int, ridge: float, student: Cache, target: Cache, valid: Tensor) -> tuple[Tensor, ...]:
    """Correlations and mapped rows from a generalised eigenproblem, which the loss does not use."""
    fit, held = halves(valid)
    x, y = rows(student, layer, fit), rows(target, layer, fit)
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    cxx, cyy, cxy = x.T @ x / len(x), y.T @ y / len(y), x.T @ y / len(x)
    for c in (cxx, cyy):
        c.flat[:: len(c) + 1] += ridge * c.trace() / len(c)
    squared, a = scipy.linalg.eigh(cxy @ scipy.linalg.solve(cyy, cxy.T), cxx)
    order = squared.argsort()[::-1][: y.shape[1]]
    a = a[:, order]
    b = scipy.linalg.solve(cyy, cxy.T @ a) / squared[order].clip(0) ** 0.5
    rho = [
        np.corrcoef(rows(student, layer, held) @ a[:, k], rows(target, layer, held) @ b[:, k])[0, 1]
        for k in range(len(order))
    ]
    mapped = (rows(student, layer, valid) - means[0]) @ a, (rows(target, layer, valid) - means[1]) @ b
    return torch.tensor(rho).clamp_min(0.01), torch.tensor(mapped[0]), torch.tensor(mapped[1])


@pytest.mark.parametrize("ridge", [1e-6, 0.05])
@pytest.mark.parametrize("trainable", [False, True])
def test_value_is_the_eigenproblem_s(ridge: float, trainable: bool) -> None:
    loss, student, target, valid = fitted(ridge=ridge, dim=4, trainable=trainable)
    weight = valid[:, None].expand(-1, 2, -1) * draw(6, BATCH, 2, TIME).abs()
    wanted = torch.zeros((), dtype=torch.float64)
    for layer in range(2):
        rho, mine, theirs = reference(layer, ridge, student, target, valid)
        torch.testing.assert_close(loss.values_correlation[layer], rho, rtol=1e-6, atol=1e-9)
        each = ((mine - theirs) ** 2 * rho).sum(1) / rho.sum()
        wanted = wanted + (each * weight[:, layer][valid]).sum()
    torch.testing.assert_close(loss(student, target, weight), wanted, rtol=1e-6, atol=1e-9)


def test_few_positions_of_noise_do_not_correlate() -> None:
    """The directions that correlate best in 12 positions reach 0.9 there; on others they do not."""
    student, target = (
        Cache(values=draw(seed, 4, 2, heads, 6, dim)) for seed, heads, dim in ((1, 2, 3), (2, 1, 4))
    )
    loss = SharedSpaceConfig(dim=4, ridge=1e-9).build(teacher=TARGET, student=STUDENT).double()
    loss.observe(student, target, torch.ones(4, 6).bool())
    loss.finish()
    assert loss.values_correlation.mean() < 0.4


def test_correlations_find_the_common_cause() -> None:
    loss, *_ = fitted(ridge=1e-6, dim=4)
    assert (loss.values_correlation[:, :2] > 0.8).all()
    assert (loss.values_correlation[:, 2:] < 0.4).all()


def test_any_invertible_map_of_either_side_leaves_the_loss() -> None:
    loss, student, target, valid = fitted(ridge=1e-9, dim=2)
    weight = valid[:, None].expand(-1, 2, -1).double()
    turned = Cache(values=target.values @ draw(8, 4, 4) + 3)
    again = SharedSpaceConfig(ridge=1e-9, dim=2).build(teacher=TARGET, student=STUDENT).double()
    again.observe(student, turned, valid)
    again.finish()
    torch.testing.assert_close(
        again(student, turned, weight), loss(student, target, weight), rtol=1e-4, atol=0
    )


def test_trained_directions_cannot_shrink_the_space() -> None:
    loss, student, target, valid = fitted(dim=3, trainable=True)
    weight = valid[:, None].expand(-1, 2, -1).double()
    before = loss(student, target, weight).detach()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(1e-3)
    torch.testing.assert_close(loss(student, target, weight).detach(), before)


def test_training_the_directions_lowers_the_loss_and_keeps_them_orthonormal() -> None:
    loss, student, target, valid = fitted(dim=2, trainable=True)
    student = Cache(values=draw(9, *student.values.shape))  # the student has moved
    weight = valid[:, None].expand(-1, 2, -1).double()
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    first = float(loss(student, target, weight).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss(student, target, weight).backward()
        optimizer.step()
    assert float(loss(student, target, weight).detach()) < 0.9 * first
    q = orthonormal_columns(loss.values_student_directions.detach())
    torch.testing.assert_close(q.mT @ q, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


def test_whitening_what_does_not_vary_is_zero() -> None:
    assert torch.equal(whitening_matrix(torch.zeros(1, 3, 3), 0.1), torch.zeros(1, 3, 3))


def test_use_before_data_and_too_little_data_are_said() -> None:
    loss = SharedSpaceConfig().build(teacher=TARGET, student=STUDENT)
    student, target, valid = sides()
    with pytest.raises(KavaError, match="used before it has seen data"):
        loss(student, target, torch.ones(BATCH, 2, TIME))
    loss.observe(student, target, torch.zeros_like(valid))
    with pytest.raises(KavaError, match="0 valid positions in a half"):
        loss.finish()


def test_the_gradient_is_that_of_finite_differences() -> None:
    loss, student, target, valid = fitted(dim=2, trainable=True)
    weight = valid[:1, None, :3].expand(-1, 2, -1).double() + 0.5
    mine, theirs = student.values[:1, :, :, :3].clone().requires_grad_(), target.values[:1, :, :, :3]
    parameters = tuple(loss.parameters())

    def value(x: Tensor, *_: Tensor) -> Tensor:
        return loss(Cache(values=x), Cache(values=theirs), weight)

    assert torch.autograd.gradcheck(value, (mine, *parameters), atol=1e-6)
