"""The calibrated projector against numpy and scipy in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from kava_core.errors import KavaError
from kava_core.protocols.axes import PARTS
from kava_core.protocols.dim_projector import Calibrated
from tests.plugins.dim_projectors.projector_helpers import (
    BATCH,
    HEAD,
    LAYER,
    QHEAD,
    T_DIM,
    TIME,
    build,
    draw,
    heads_of,
)

torch.set_num_threads(1)
METHODS = ["pca", "procrustes", "ridge"]
ONTO = ["procrustes", "ridge"]
DIMS = [1, 3, 5, 8]


def pair(seed, part, dim, *, noise=0.1):
    """Teacher rows of unequal spread and a mean, and student rows that depend on them."""
    head = heads_of(part)
    one = torch.Generator().manual_seed(9)
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5]).double()
    turned = torch.linalg.qr(torch.randn(LAYER, head, T_DIM, T_DIM, generator=one).double())[0]
    onto = torch.randn(LAYER, head, T_DIM, dim, generator=one).double()
    x = (draw(head, seed) * spread + torch.arange(5.0)) @ turned
    like = x @ onto + 3 + noise * draw(head, seed + 100, dim=dim)
    return x, like


def some_valid(seed):
    return torch.rand(BATCH, TIME, generator=torch.Generator().manual_seed(seed)) < 0.7


def calibrate(projector, dim, parts=("keys",), seeds=(0, 1, 2)):
    """Observe batches whose invalid positions are NaN.

    Returns the valid rows of the last part, ``x`` and ``like``, each ``[row, layer, head, dim]``.
    """
    for part in parts:
        kept = [], []
        for seed in seeds:
            valid, (x, like) = some_valid(seed), pair(seed, part, dim)
            hole = ~valid[:, None, None, :, None]
            projector.observe(x.masked_fill(hole, torch.nan), like.masked_fill(hole, torch.nan), valid, part)
            for rows, one in zip(kept, (x, like), strict=True):
                rows.append(one.permute(0, 3, 1, 2, 4)[valid])
    projector.finish()
    return tuple(torch.cat(rows).numpy() for rows in kept)


def as_input(rows):
    """``[row, layer, head, dim]`` as one example."""
    return torch.from_numpy(rows).permute(1, 2, 0, 3)[None]


def reference(method, x, like, dim, ridge=1e-3):
    """``fit(x) → y`` by definition, from float64 rows ``x [row, t_dim]`` and ``like [row, dim]``."""
    mean, like_mean = x.mean(0), like.mean(0)
    centred, aim = x - mean, like - like_mean
    if method == "pca":
        directions = np.linalg.svd(centred, full_matrices=False)[2][:dim]
        signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
        basis = np.zeros((dim, x.shape[1]))
        basis[: len(directions)] = directions * signs[:, None]
        return lambda y: (y - mean) @ basis.T
    if method == "ridge":
        penalty = math.sqrt(ridge * centred.var(0).mean() * len(x))
        tall = np.vstack([centred, penalty * np.eye(x.shape[1])])
        weights = np.linalg.lstsq(tall, np.vstack([aim, np.zeros((x.shape[1], dim))]), rcond=None)[0]
        return lambda y: (y - mean) @ weights + like_mean
    return _rotation(centred, aim, mean, like_mean)


def _rotation(centred, aim, mean, like_mean):
    """Zero-padded to one width, the rotation of scipy serves equal widths and a wider student."""
    width = max(centred.shape[1], aim.shape[1])
    square = [np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in (centred, aim)]
    rotation = orthogonal_procrustes(*square)[0][: centred.shape[1], : aim.shape[1]]
    turned = centred @ rotation
    scale = (turned * aim).sum() / (turned**2).sum()
    return lambda y: scale * (y - mean) @ rotation + like_mean


def expect_reference(found, x, like, method, dim, per_head, tolerance):
    for layer in range(LAYER):
        for h in range(x.shape[2]):
            mine, aim = x[:, layer, h], like[:, layer, h]
            if not per_head:
                mine, aim = x[:, layer].reshape(-1, T_DIM), like[:, layer].reshape(-1, dim)
            wanted = reference(method, mine, aim, dim)(x[:, layer, h])
            np.testing.assert_allclose(found[0, layer, h].numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("method", ["pca", "ridge"])
def test_principal_components_and_ridge_are_numpys(method, part, dim, per_head):
    projector = build("calibrated", dim, method=method, per_head=per_head)
    assert isinstance(projector, Calibrated)
    x, like = calibrate(projector, dim, (part,))
    expect_reference(projector(as_input(x), part), x, like, method, dim, per_head, 1e-4)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dim", [5, 8])
@pytest.mark.parametrize("part", PARTS)
def test_procrustes_is_scipys(part, dim, per_head):
    projector = build("calibrated", dim, method="procrustes", per_head=per_head)
    x, like = calibrate(projector, dim, (part,))
    expect_reference(projector(as_input(x), part), x, like, "procrustes", dim, per_head, 1e-4)


@pytest.mark.parametrize("dim", DIMS)
def test_procrustes_is_one_scale_times_orthonormal_rows_or_columns(dim):
    projector = build("calibrated", dim, method="procrustes")
    calibrate(projector, dim)
    basis = projector.keys_basis.double()
    product = basis @ basis.mT if dim <= T_DIM else basis.mT @ basis
    scale = product[..., 0, 0]
    eye = torch.eye(min(dim, T_DIM)).double().expand_as(product)
    torch.testing.assert_close(product / scale[..., None, None], eye, rtol=0, atol=1e-5)
    assert scale.min() > 0


@pytest.mark.parametrize("dim", [1, 3])
def test_procrustes_onto_fewer_channels_has_the_largest_covariance(dim):
    """No other orthonormal rows do better, and the scale is the best for these rows."""
    projector = build("calibrated", dim, method="procrustes")
    x, like = calibrate(projector, dim)
    mine, aim = (rows[:, 0, 0] - rows[:, 0, 0].mean(0) for rows in (x, like))
    basis = projector.keys_basis[0, 0].double().numpy()
    scale = math.sqrt((basis @ basis.T)[0, 0])
    reached = np.trace(aim.T @ mine @ basis.T) / scale
    turns = np.linalg.qr(np.random.default_rng(0).normal(size=(500, T_DIM, dim)))[0]
    assert reached >= np.einsum("nd,ne,ked->k", aim, mine, turns).max()
    turned = mine @ basis.T / scale
    assert scale == pytest.approx((turned * aim).sum() / (turned**2).sum(), rel=1e-5)


@pytest.mark.parametrize("method", ONTO)
@pytest.mark.parametrize("dim", [T_DIM, 8])
def test_a_turned_scaled_and_shifted_copy_is_found(method, dim):
    """A student that is the teacher in another basis: nothing is left over."""
    turn = torch.linalg.qr(torch.randn(LAYER, HEAD, dim, T_DIM).double())[0]
    x = draw(seed=3) + torch.arange(5.0)
    like = 2.5 * x @ turn.mT - 4
    projector = build("calibrated", dim, method=method, ridge=1e-9)
    projector.observe(x, like, torch.ones(BATCH, TIME, dtype=torch.bool), "keys")
    projector.finish()
    torch.testing.assert_close(projector(x, "keys"), like, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ONTO)
def test_queries_are_calibrated_on_queries(method):
    projector = build("calibrated", 8, method=method)
    x, like = calibrate(projector, 8, PARTS)
    expect_reference(projector(as_input(x), "queries"), x, like, method, 8, True, 1e-4)
    assert projector.queries_basis.shape[1] == QHEAD


def test_without_queries_to_compare_there_is_nothing_for_them():
    assert not any("queries" in name for name in build("calibrated", 3, method="ridge", qhead=0).state_dict())


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 100.0])
def test_ridge_strength_is_relative(strength):
    """Scaling the teacher changes nothing; a stronger penalty is numpy's."""
    projector, scaled = (build("calibrated", 3, method="ridge", ridge=strength) for _ in range(2))
    x, like = pair(0, "keys", 3)
    whole = torch.ones(BATCH, TIME, dtype=torch.bool)
    for one, factor in ((projector, 1.0), (scaled, 1000.0)):
        one.observe(factor * x, like, whole, "keys")
        one.finish()
    torch.testing.assert_close(scaled(1000 * x, "keys"), projector(x, "keys"), rtol=1e-4, atol=1e-4)
    rows, aims = (one[:, 0, 0].reshape(-1, one.shape[-1]).numpy() for one in (x, like))
    wanted = reference("ridge", rows, aims, 3, strength)(rows)
    found = projector(x, "keys")[:, 0, 0].reshape(-1, 3).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_many_batches_are_one(method):
    many, one = (build("calibrated", 3, method=method) for _ in range(2))
    batches = [(*pair(seed, "keys", 3), some_valid(seed)) for seed in range(4)]
    batches.insert(1, (*pair(7, "keys", 3), torch.zeros(BATCH, TIME, dtype=torch.bool)))
    for x, like, valid in batches:
        many.observe(x, like, valid, "keys")
    one.observe(*(torch.cat(kind) for kind in zip(*batches, strict=True)), "keys")
    many.finish()
    one.finish()
    x = draw(seed=50)
    torch.testing.assert_close(many(x, "keys"), one(x, "keys"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_order_of_the_batch_do_not_matter(method):
    plain, padded = (build("calibrated", 3, method=method) for _ in range(2))
    (x, like), valid = pair(0, "keys", 3), some_valid(0)
    plain.observe(x, like, valid, "keys")
    wide = [torch.cat([torch.full_like(one, 1e6), one], 3).flip(0) for one in (x, like)]
    padded.observe(*wide, torch.cat([torch.zeros_like(valid), valid], 1).flip(0), "keys")
    plain.finish()
    padded.finish()
    torch.testing.assert_close(plain(x, "keys"), padded(x, "keys"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_massive_means_keep_the_digits(method, dtype):
    """A channel at 100,000 with a spread of 1, as massive activations have, in several batches."""
    far = torch.tensor([1e5, 0, -3e4, 0, 0])
    near, shifted = (build("calibrated", 2, method=method) for _ in range(2))
    whole = torch.ones(BATCH, TIME, dtype=torch.bool)
    moved = []
    for seed in range(3):
        x, like = (one.to(dtype) for one in pair(seed, "keys", 2))
        moved.append((x + far).to(dtype))
        near.observe((moved[-1].double() - far), like, whole, "keys")
        shifted.observe(moved[-1], like + 1e4, whole, "keys")
    near.finish()
    shifted.finish()
    found = shifted(moved[0].double(), "keys") - (0 if method == "pca" else 1e4)
    # The mean is stored in float32: 1e5 there is exact to 0.004.
    torch.testing.assert_close(found, near(moved[0].double() - far, "keys"), rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_the_basis_does_not_see_where_zero_is(method):
    """At a distance of 1e8, squares of float64 numbers have no digit left for a spread of 1."""
    near, far = (build("calibrated", 2, method=method) for _ in range(2))
    for seed in range(3):
        (x, like), valid = pair(seed, "keys", 2), some_valid(seed)
        near.observe(x, like, valid, "keys")
        far.observe(x + 1e8, like + 1e8, valid, "keys")
    near.finish()
    far.finish()
    torch.testing.assert_close(far.keys_basis, near.keys_basis, rtol=1e-4, atol=1e-5)


def test_calibrated_pads_a_wider_student_with_zeros():
    projector = build("calibrated", 8)
    x, _ = calibrate(projector, 8)
    found = projector(as_input(x), "keys")
    assert not found[..., T_DIM:].any()
    lengths = torch.from_numpy(((x - x.mean(0)) ** 2).sum(-1)).permute(1, 2, 0)
    torch.testing.assert_close(found[0].square().sum(-1), lengths, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_layers_heads_and_parts_are_apart(method):
    """Each map is the one that its own rows alone would give."""
    projector = build("calibrated", 3, method=method)
    calibrate(projector, 3, ("keys", "values"), seeds=(0,))
    for layer in range(LAYER):
        for h in range(HEAD):
            alone = build("calibrated", 3, method=method, layer=1, head=1, qhead=0)
            x, like = (one[:, layer : layer + 1, h : h + 1] for one in pair(0, "values", 3))
            alone.observe(x, like, some_valid(0), "values")
            alone.finish()
            found = projector(pair(0, "values", 3)[0], "values")[:, layer, h]
            torch.testing.assert_close(found, alone(x, "values")[:, 0, 0], rtol=1e-5, atol=1e-5)


def test_principal_components_keep_scores():
    """With a whole basis, q·(k − mean) survives; the mean adds the same to all keys of a query."""
    projector = build("calibrated", T_DIM)
    calibrate(projector, T_DIM, ("queries", "keys"))
    queries, keys = draw(QHEAD, seed=5), draw(seed=6)
    scores = torch.einsum("blhtd,blhsd->blhts", queries, keys.repeat_interleave(QHEAD // HEAD, 2)).softmax(-1)
    q, k = projector(queries, "queries"), projector(keys, "keys").repeat_interleave(QHEAD // HEAD, 2)
    found = torch.einsum("blhtd,blhsd->blhts", q, k).softmax(-1)
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_before_and_after_saving(method):
    projector = build("calibrated", 3, method=method)
    x, _ = calibrate(projector, 3)
    other = build("calibrated", 3, method=method)
    with pytest.raises(KavaError) as caught:
        other(as_input(x), "keys")
    wanted = "dim_projector calibrated: keys used before calibration; call observe() and finish() first"
    assert str(caught.value) == wanted
    other.load_state_dict(copy.deepcopy(projector.state_dict()))
    assert torch.equal(other(as_input(x), "keys"), projector(as_input(x), "keys"))
    with pytest.raises(KavaError, match="values used before calibration"):
        other(as_input(x), "values")


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_too_few_positions_are_refused(method, positions):
    projector = build("calibrated", 3, method=method)
    valid = torch.zeros(BATCH, TIME, dtype=torch.bool)
    valid[0, :positions] = True
    projector.observe(draw(), draw(dim=3), valid, "keys")
    with pytest.raises(KavaError) as caught:
        projector.finish()
    assert str(caught.value) == (
        f"dim_projector calibrated: {positions} valid positions were observed, at least 2 are needed; "
        "check train.calibration_examples and the time warper"
    )


@pytest.mark.parametrize("time", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_short_sequences_are_projected(method, time):
    projector = build("calibrated", 3, method=method)
    calibrate(projector, 3)
    assert projector(draw(time=time), "keys").shape == (BATCH, LAYER, HEAD, time, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("still", ["x", "like", "both"])
def test_what_does_not_vary_gives_finite_numbers(method, still):
    projector = build("calibrated", 3, method=method)
    x, like = draw(), draw(dim=3, seed=1)
    x = torch.full_like(x, 0.3) if still != "like" else x
    like = torch.full_like(like, 0.7) if still != "x" else like
    projector.observe(x, like, torch.ones(BATCH, TIME, dtype=torch.bool), "keys")
    projector.finish()
    found = projector(x, "keys")
    assert torch.isfinite(found).all()
    if method != "pca" and still != "x":
        torch.testing.assert_close(found, like, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_positions_than_channels_are_finite(method):
    projector = build("calibrated", 8, method=method)
    valid = torch.zeros(BATCH, TIME, dtype=torch.bool)
    valid[0, :2] = True
    projector.observe(*pair(0, "keys", 8), valid, "keys")
    projector.finish()
    assert torch.isfinite(projector(draw(), "keys")).all()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    """The mean is taken off before rounding, so a mean of 1000 costs what the input had lost already."""
    projector = build("calibrated", 3, method=method)
    (x, like), whole = pair(0, "keys", 3), torch.ones(BATCH, TIME, dtype=torch.bool)
    half = (x + 1000 * (torch.arange(5) == 2)).bfloat16()
    projector.observe(half, like.bfloat16(), whole, "keys")
    projector.finish()
    found, wanted = projector(half, "keys"), projector(half.double(), "keys")
    assert found.dtype == torch.bfloat16
    scale = float(wanted.std())
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_unless_trainable(method):
    assert not list(build("calibrated", 3, method=method).parameters())
    projector = build("calibrated", 3, method=method, trainable=True)
    parameter = projector.keys_basis
    x, _ = calibrate(projector, 3)
    assert projector.keys_basis is parameter
    given = as_input(x).float().requires_grad_()
    projector(given, "keys").square().sum().backward()
    assert parameter.grad.abs().sum() > 0
    assert torch.isfinite(parameter.grad).all()
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_data_is_kept(method):
    projector = build("calibrated", 3, method=method)
    x, like = (one.requires_grad_() for one in pair(0, "keys", 3))
    projector.observe(x, like, some_valid(0), "keys")
    kept = sum(one.numel() for one in vars(projector._seen["keys"]).values() if torch.is_tensor(one))
    assert kept == LAYER * HEAD * (2 * T_DIM + 2 * 3 + T_DIM * T_DIM + 3 * T_DIM)
    assert not any(
        one.requires_grad for one in vars(projector._seen["keys"]).values() if torch.is_tensor(one)
    )
    projector.finish()
    assert projector._seen == {}


@pytest.mark.parametrize("method", METHODS)
def test_stages_may_be_exchanged(method):
    """Row-stochastic time maps commute with the affine projection, offset and all."""
    projector = build("calibrated", 3, method=method)
    calibrate(projector, 3)
    assert projector.linear
    x, time = draw(), torch.rand(4, TIME).double().softmax(-1)
    torch.testing.assert_close(projector(time @ x, "keys"), time @ projector(x, "keys"), rtol=1e-5, atol=1e-5)
