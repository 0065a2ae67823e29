"""Projectors against loops over layers and heads, and principal components by definition."""

from __future__ import annotations

import copy

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.kv.axes import Geometry
from kava_core.protocols import Calibrated
from kava_plugins.dim_projectors import kava_dim_projectors

torch.set_num_threads(1)
BATCH, LAYER, HEAD, QHEAD, TIME, T_DIM = 3, 2, 2, 4, 7, 5


def build(name, dim, *, layer=LAYER, head=HEAD, t_dim=T_DIM, **fields):
    [declaration] = [one for one in kava_dim_projectors() if one.component_name() == name]
    student = Geometry(layer=layer, head=head, dim=dim, qhead=QHEAD, hidden=8)
    return declaration(**fields).build(teacher=student.with_(dim=t_dim), student=student)


def draw(head=HEAD, seed=0, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, LAYER, head, TIME, T_DIM, dtype=torch.float64, generator=generator)


def slow_project(x, matrix):
    """``matrix[layer, head, dim, t_dim]`` times every vector."""
    batch, layer, head, time, _ = x.shape
    out = torch.zeros(batch, layer, head, time, matrix.shape[2], dtype=torch.float64)
    for i in range(layer):
        for h in range(head):
            out[:, i, h] = x[:, i, h] @ matrix[i, h].T
    return out


def matrix_of(projector, part, head):
    """The linear map itself: what becomes of the unit vectors. ``[layer, head, dim, t_dim]``."""
    unit = torch.eye(T_DIM, dtype=torch.float64).expand(1, LAYER, head, -1, -1)
    return projector(unit, part)[0].mT


def test_identity_returns_its_argument():
    x = draw()
    assert build("identity", T_DIM)(x, "keys") is x


@pytest.mark.parametrize("dim", [3, 5, 8])
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("init", ["orthogonal", "random"])
def test_linear_shares_what_it_says(dim, share_heads, share_kv, init):
    projector = build("linear", dim, share_heads=share_heads, share_kv=share_kv, init=init)
    heads = {"keys": HEAD, "values": HEAD, "queries": QHEAD}
    matrix = {part: matrix_of(projector, part, head).detach() for part, head in heads.items()}
    for part, head in heads.items():
        x = draw(head)
        torch.testing.assert_close(projector(x, part), slow_project(x, matrix[part]))
        assert torch.equal(matrix[part][:, 0], matrix[part][:, 1]) is share_heads
        assert not torch.equal(matrix[part][0], matrix[part][1])
    assert torch.equal(matrix["keys"], matrix["values"]) is share_kv
    if share_heads:
        assert torch.equal(matrix["keys"][:, 0], matrix["queries"][:, 0])


@pytest.mark.parametrize("dim", [3, 5, 8])
def test_orthogonal_matrices_are_orthonormal(dim):
    matrix = matrix_of(build("linear", dim, share_heads=False), "keys", HEAD)
    product = matrix @ matrix.mT if dim <= T_DIM else matrix.mT @ matrix
    torch.testing.assert_close(
        product, torch.eye(min(dim, T_DIM)).double().expand_as(product), rtol=0, atol=1e-6
    )


def test_linear_follows_its_seed_not_the_global_one():
    torch.manual_seed(1)
    first, other = build("linear", 3, seed=4), build("linear", 3, seed=5)
    torch.manual_seed(2)
    again = build("linear", 3, seed=4)
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.keys, other.keys)


def test_linear_gradient_and_training():
    projector, x = build("linear", 3, share_heads=False).double(), draw().requires_grad_()
    upstream = torch.randn(BATCH, LAYER, HEAD, TIME, 3, dtype=torch.float64)
    matrix = projector.keys.detach().clone().requires_grad_()
    mine = torch.autograd.grad((projector(x, "keys") * upstream).sum(), (x, projector.keys))
    theirs = torch.autograd.grad((slow_project(x, matrix) * upstream).sum(), (x, matrix))
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, wanted)
    frozen = build("linear", 3, trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("name", ["linear", "calibrated"])
def test_meta_shapes(name):
    with torch.device("meta"):
        projector = build(name, 3)
        assert projector(torch.empty(2, LAYER, HEAD, 4, T_DIM), "values").shape == (2, LAYER, HEAD, 4, 3)
        assert projector(torch.empty(2, LAYER, QHEAD, 4, T_DIM), "queries").shape == (2, LAYER, QHEAD, 4, 3)


def calibrate(projector, part="keys", seeds=(0, 1, 2)):
    """Observe batches in which some positions are NaN and not valid; the valid rows of each batch."""
    kept = []
    for seed in seeds:
        x = draw(seed=seed) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5]) + torch.arange(5.0)
        x = (
            x
            @ torch.linalg.qr(torch.randn(T_DIM, T_DIM, generator=torch.Generator().manual_seed(9)).double())[
                0
            ]
        )
        valid = torch.rand(BATCH, TIME, generator=torch.Generator().manual_seed(seed)) < 0.7
        x = torch.where(valid[:, None, None, :, None], x, torch.nan)
        projector.observe(x, valid, part)
        kept += [x[b, :, :, t] for b in range(BATCH) for t in range(TIME) if valid[b, t]]
    projector.finish()
    return torch.stack(kept)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 5])
def test_calibrated_finds_the_principal_components(per_head, dim):
    projector = build("calibrated", dim, per_head=per_head)
    assert isinstance(projector, Calibrated)
    rows = calibrate(projector)
    found = projector(rows.permute(1, 2, 0, 3)[None], "keys")[0]
    for layer in range(LAYER):
        for h in range(HEAD):
            mine = rows[:, layer, h] if per_head else rows[:, layer].reshape(-1, T_DIM)
            centred = mine - mine.mean(0)
            directions = torch.linalg.svd(centred, full_matrices=False).Vh[:dim]
            signs = torch.stack([row[row.abs().argmax()].sign() for row in directions])
            wanted = (rows[:, layer, h] - mine.mean(0)) @ (directions * signs[:, None]).T
            torch.testing.assert_close(found[layer, h], wanted, rtol=1e-4, atol=1e-4)


def test_calibrated_pads_a_wider_student_with_zeros():
    projector = build("calibrated", 8)
    rows = calibrate(projector)
    found = projector(rows.permute(1, 2, 0, 3)[None], "keys")
    assert not found[..., T_DIM:].any()
    lengths = (rows - rows.mean(0)).square().sum(-1).permute(1, 2, 0)
    torch.testing.assert_close(found[0].square().sum(-1), lengths, rtol=1e-5, atol=1e-5)


def test_calibrated_keys_and_values_are_apart():
    projector = build("calibrated", 3)
    projector.observe(draw(seed=1), torch.ones(BATCH, TIME, dtype=torch.bool), "keys")
    projector.observe(draw(seed=2), torch.ones(BATCH, TIME, dtype=torch.bool), "values")
    projector.finish()
    alone = build("calibrated", 3)
    alone.observe(draw(seed=2), torch.ones(BATCH, TIME, dtype=torch.bool), "values")
    alone.finish()
    x = draw(seed=3)
    assert torch.equal(projector(x, "values"), alone(x, "values"))
    assert not torch.equal(projector(x, "keys"), projector(x, "values"))


def test_calibrated_keeps_scores():
    """With a whole basis, q·(k − mean) survives; the mean adds the same to all keys of a query."""
    projector = build("calibrated", T_DIM)
    calibrate(projector)
    queries, keys = draw(QHEAD, seed=5), draw(seed=6)
    scores = torch.einsum("blhtd,blhsd->blhts", queries, keys.repeat_interleave(QHEAD // HEAD, 2)).softmax(-1)
    q, k = projector(queries, "queries"), projector(keys, "keys").repeat_interleave(QHEAD // HEAD, 2)
    found = torch.einsum("blhtd,blhsd->blhts", q, k).softmax(-1)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)


def test_calibrated_survives_a_large_mean():
    projector = build("calibrated", 2)
    x = draw() + 1000
    projector.observe(x, torch.ones(BATCH, TIME, dtype=torch.bool), "keys")
    projector.finish()
    rows = x.permute(1, 2, 0, 3, 4).reshape(LAYER, HEAD, -1, T_DIM)
    explained = torch.linalg.svdvals(rows - rows.mean(2, keepdim=True))[..., :2].square().sum(-1)
    found = projector(x.float(), "keys").double().square().sum((0, 3, 4))
    torch.testing.assert_close(found, explained, rtol=1e-3, atol=0)


def test_calibrated_before_and_after_saving():
    projector = build("calibrated", 3)
    rows = calibrate(projector)
    x = rows.permute(1, 2, 0, 3)[None]
    other = build("calibrated", 3)
    with pytest.raises(KavaError) as caught:
        other(x, "keys")
    wanted = "dim_projector calibrated: keys used before calibration; call observe() and finish() first"
    assert str(caught.value) == wanted
    other.load_state_dict(copy.deepcopy(projector.state_dict()))
    assert torch.equal(other(x, "keys"), projector(x, "keys"))
    with pytest.raises(KavaError, match="values used before calibration"):
        other(x, "values")


@pytest.mark.parametrize("positions", [0, 1])
def test_calibrated_refuses_too_little(positions):
    projector = build("calibrated", 3)
    valid = torch.zeros(BATCH, TIME, dtype=torch.bool)
    valid[0, :positions] = True
    projector.observe(draw(), valid, "keys")
    with pytest.raises(KavaError) as caught:
        projector.finish()
    assert str(caught.value) == (
        f"dim_projector calibrated: {positions} valid positions were observed, at least 2 are needed; "
        "check train.calibration_examples and the time warper"
    )


def test_calibrated_is_frozen_unless_trainable():
    assert not list(build("calibrated", 3).parameters())
    projector = build("calibrated", 3, trainable=True)
    parameter = projector.keys_basis
    rows = calibrate(projector)
    assert projector.keys_basis is parameter
    projector(rows.permute(1, 2, 0, 3)[None].float(), "keys").square().sum().backward()
    assert parameter.grad.abs().sum() > 0
