"""Projectors without calibration against loops over layers and heads."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kava_core.protocols.axes import PARTS
from kava_plugins.dim_projectors._matrices import apply_matrices
from tests.plugins.dim_projectors.projector_helpers import (
    BATCH,
    HEAD,
    LAYER,
    QHEAD,
    T_DIM,
    TIME,
    build,
    declare,
    draw,
    heads_of,
)

torch.set_num_threads(1)
TRAINED = ["linear", "elastic"]


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


def bottlenecks(projector, part, head):
    """The same weights in torch's own layers, one stack for each layer and head."""
    owner = projector.owner[part]
    return [[_stack(projector, owner, layer, h) for h in range(head)] for layer in range(LAYER)]


def _stack(projector, owner, layer, h):
    linears = []
    for name in ("down", "up"):
        weight, bias = (getattr(projector, f"{owner}_{name}{end}") for end in ("", "_bias"))
        h = min(h, weight.shape[1] - 1)
        linear = nn.Linear(weight.shape[3], weight.shape[2], dtype=torch.float64)
        linear.load_state_dict({"weight": weight[layer, h].double(), "bias": bias[layer, h, 0].double()})
        linears.append(linear)
    norm = nn.LayerNorm(linears[0].in_features, dtype=torch.float64)
    return nn.Sequential(norm, linears[0], nn.SiLU(), linears[1])


def slow_elastic(projector, x, part):
    stacks = bottlenecks(projector, part, x.shape[2])
    layers = [
        torch.stack([stack(x[:, i, h]) for h, stack in enumerate(row)], 1) for i, row in enumerate(stacks)
    ]
    return torch.stack(layers, 1)


def with_biases(projector):
    """Biases start at zero; here they are something."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in projector.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=generator)
    return projector.eval()


def test_identity_returns_its_argument():
    x = draw()
    projector = build("identity", T_DIM)
    assert all(projector(x, part) is x for part in PARTS)
    assert not list(projector.parameters())


@pytest.mark.parametrize("dim", [3, 5, 8])
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("init", ["orthogonal", "random"])
def test_linear_shares_what_it_says(dim, share_heads, share_kv, init):
    projector = build("linear", dim, share_heads=share_heads, share_kv=share_kv, init=init)
    matrix = {part: matrix_of(projector, part, heads_of(part)).detach() for part in PARTS}
    for part in PARTS:
        x = draw(heads_of(part))
        torch.testing.assert_close(projector(x, part), slow_project(x, matrix[part]))
        assert torch.equal(matrix[part][:, 0], matrix[part][:, 1]) is share_heads
        assert not torch.equal(matrix[part][0], matrix[part][1])
    assert torch.equal(matrix["keys"], matrix["values"]) is share_kv
    if share_heads:
        assert torch.equal(matrix["keys"][:, 0], matrix["queries"][:, 0])


@pytest.mark.parametrize("head", [1, HEAD])
@pytest.mark.parametrize("time", [0, 1, 2, 30])
def test_project_is_the_loop_for_few_and_many_positions(head, time):
    """It chooses between two products by the number of positions."""
    matrix = torch.randn(LAYER, head, 6, T_DIM, dtype=torch.float64)
    x = draw(time=time)
    wanted = slow_project(x, matrix.expand(-1, HEAD, -1, -1))
    torch.testing.assert_close(apply_matrices(x, matrix), wanted)


@pytest.mark.parametrize("dim", [3, 5, 8])
def test_orthogonal_matrices_are_orthonormal(dim):
    matrix = matrix_of(build("linear", dim, share_heads=False), "keys", HEAD)
    product = matrix @ matrix.mT if dim <= T_DIM else matrix.mT @ matrix
    eye = torch.eye(min(dim, T_DIM)).double().expand_as(product)
    torch.testing.assert_close(product, eye, rtol=0, atol=1e-6)


def test_random_matrices_keep_the_variance():
    matrix = build("linear", 300, t_dim=200, init="random").keys
    assert matrix.std().item() == pytest.approx(1 / math.sqrt(200), rel=0.02)


@pytest.mark.parametrize("name", TRAINED)
def test_matrices_follow_their_seed_not_the_global_one(name):
    torch.manual_seed(1)
    first, other = build(name, 3, seed=4), build(name, 3, seed=5)
    torch.manual_seed(2)
    again = build(name, 3, seed=4)
    for (key, mine), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(mine, same)
        assert key.endswith("bias") or not torch.equal(mine, different)


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


@pytest.mark.parametrize("dim", [3, 5, 8])
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
def test_elastic_is_torchs_own_layers(dim, share_heads, share_kv):
    fields = {"share_heads": share_heads, "share_kv": share_kv, "mlp_ratio": 2.0}
    projector = with_biases(build("elastic", dim, **fields))
    for part in PARTS:
        x = draw(heads_of(part), seed=len(part))
        found, wanted = projector(x, part), slow_elastic(projector, x, part)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    x = draw()
    assert torch.equal(projector(x, "keys"), projector(x, "values")) is share_kv
    alike = projector(x[:, :, :1].expand(-1, -1, HEAD, -1, -1), "keys")
    assert torch.allclose(alike[:, :, 0], alike[:, :, 1]) is share_heads


def test_elastic_gradients_are_those_of_torchs_own_layers():
    projector, x = with_biases(build("elastic", 3).double()), draw().requires_grad_()
    upstream = torch.randn(BATCH, LAYER, HEAD, TIME, 3, dtype=torch.float64)
    mine = torch.autograd.grad((projector(x, "keys") * upstream).sum(), x)
    theirs = torch.autograd.grad((slow_elastic(projector, x, "keys") * upstream).sum(), x)
    torch.testing.assert_close(mine, theirs)
    projector(x, "keys").square().sum().backward()
    trained = {name for name, parameter in projector.named_parameters() if parameter.grad is not None}
    assert trained == {"keys_down", "keys_down_bias", "keys_up", "keys_up_bias"}
    assert all(projector.get_parameter(name).grad.abs().sum() > 0 for name in trained)


def test_elastic_drops_only_while_training():
    torch.manual_seed(0)
    projector, x = build("elastic", 64, mlp_ratio=4.0, dropout=0.5), draw().float()
    assert not torch.equal(projector(x, "keys"), projector(x, "keys"))
    calm = projector.eval()(x, "keys").detach()
    assert torch.equal(projector(x, "keys"), calm)
    projector.train()
    noisy = torch.stack([projector(x, "keys").detach() for _ in range(500)]).mean(0)
    torch.testing.assert_close(noisy, calm, rtol=0, atol=0.25 * float(calm.std()))


def test_elastic_without_dropout_is_the_same_in_training():
    projector, x = build("elastic", 3, dropout=0.0), draw().float()
    assert torch.equal(projector.train()(x, "keys"), projector.eval()(x, "keys"))


# Hidden widths as published in the models' config.json.
SIZES = [
    ("Llama-3.1-405B", 16384, 405, 2.0),
    ("Llama-3-70B", 8192, 70, 2.0),
    ("Qwen2.5-72B", 8192, 72.7, 2.0),
    ("Qwen2.5-32B", 5120, 32.5, 1.0),
    ("Llama-2-13B", 5120, 13, 1.0),
    ("Llama-3-8B", 4096, 8, 1.0),
    ("Qwen2.5-7B", 3584, 7.6, 1.0),
    ("Llama-3.2-3B", 3072, 3.2, 0.5),
    ("Qwen2.5-1.5B", 1536, 1.5, 0.5),
    ("Qwen2.5-0.5B", 896, 0.5, 0.5),
]


@pytest.mark.parametrize(("hidden", "size", "ratio"), [row[1:] for row in SIZES], ids=[r[0] for r in SIZES])
def test_elastic_is_as_wide_as_the_teacher_is_large(hidden, size, ratio):
    inside = round(ratio * 64)
    assert build("elastic", 64, t_hidden=hidden).inside == inside
    assert build("elastic", 64, hidden=hidden).inside == inside  # the other direction
    assert build("elastic", 64, t_hidden=8, teacher_size=size).inside == inside
    assert build("elastic", 64, t_hidden=hidden, mlp_ratio=1.5).inside == 96


@pytest.mark.parametrize(("size", "ratio"), [(6.9, 0.5), (7, 1.0), (14, 1.0), (69.9, 1.0), (70, 2.0)])
def test_elastic_borders_of_size(size, ratio):
    assert build("elastic", 10, teacher_size=size).inside == ratio * 10


def test_elastic_has_at_least_one_channel():
    projector = build("elastic", 1, mlp_ratio=0.1)
    assert projector.inside == 1
    assert projector(draw().float(), "keys").shape[-1] == 1


def test_elastic_refuses_a_size_that_says_nothing():
    with pytest.raises(ValidationError) as caught:
        declare("elastic", mlp_ratio=1.0, teacher_size=7)
    assert str(caught.value.errors()[0]["ctx"]["error"]) == (
        "teacher_size only says which ratio 'mlp_ratio: auto' means; leave out one"
    )


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("share_heads", [False, True])
def test_parameters_are_counted(share_heads, share_kv):
    head, sides = (1 if share_heads else HEAD), (1 if share_kv else 2)
    vectors = LAYER * sides * head
    fields = {"share_heads": share_heads, "share_kv": share_kv, "qhead": 0}
    linear, elastic = build("linear", 3, **fields), build("elastic", 3, mlp_ratio=2.0, **fields)
    assert sum(p.numel() for p in linear.parameters()) == vectors * 3 * T_DIM
    each = T_DIM * 6 + 6 + 6 * 3 + 3
    assert sum(p.numel() for p in elastic.parameters()) == vectors * each


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    ("layer", "head", "time", "dims"), [(1, 1, 1, (1, 1)), (1, 1, 0, (4, 2)), (3, 1, 1, (2, 4))]
)
def test_smallest_extents(name, layer, head, time, dims):
    t_dim, dim = dims
    projector = build(name, dim, layer=layer, head=head, qhead=head, t_dim=t_dim)
    x = draw(head, layer=layer, time=time, dim=t_dim).float().requires_grad_()
    found = projector(x, "keys")
    assert found.shape == (BATCH, layer, head, time, dim)
    found.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", TRAINED)
def test_half_precision(name):
    projector = build(name, 3).eval()
    x = draw().bfloat16()
    found, wanted = projector(x, "values"), projector(x.double(), "values")
    assert found.dtype == torch.bfloat16
    assert found.shape == (BATCH, LAYER, HEAD, TIME, 3)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", TRAINED)
def test_neither_the_batch_nor_its_padding_matters(name):
    projector, x = build(name, 3, share_heads=False).eval(), draw()
    whole = projector(x, "keys")
    for b in range(BATCH):
        torch.testing.assert_close(projector(x[b : b + 1], "keys"), whole[b : b + 1])
    padded = torch.cat([x, torch.full_like(x, 1e4)], 3)
    torch.testing.assert_close(projector(padded, "keys")[:, :, :, :TIME], whole)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("axis", [1, 2])
def test_layers_and_heads_do_not_see_each_other(name, axis):
    projector, x = build(name, 3, share_heads=False).eval(), draw()
    changed = x.clone()
    changed.select(axis, 0).add_(torch.randn(T_DIM))
    before, after = projector(x, "keys"), projector(changed, "keys")
    torch.testing.assert_close(after.select(axis, 1), before.select(axis, 1), rtol=0, atol=0)
    assert not torch.allclose(after.select(axis, 0), before.select(axis, 0))


@pytest.mark.parametrize("name", ["linear", "elastic", "calibrated"])
def test_learning_rate_is_where_the_engine_looks(name):
    trained = {"trainable": True} if name == "calibrated" else {}
    assert build(name, 3).learning_rate is None
    assert build(name, 3, learning_rate=1e-5, **trained).learning_rate == 1e-5
    with pytest.raises(ValidationError):
        declare(name, learning_rate=0, **trained)


@pytest.mark.parametrize("name", ["linear", "calibrated"])
def test_learning_rate_of_what_is_not_trained(name):
    with pytest.raises(ValidationError, match="'learning_rate' has no effect with 'trainable: false'"):
        declare(name, learning_rate=1e-5, trainable=False)


@pytest.mark.parametrize("name", ["linear", "elastic", "calibrated"])
def test_meta_shapes(name):
    with torch.device("meta"):
        projector = build(name, 3)
        assert projector(torch.empty(2, LAYER, HEAD, 4, T_DIM), "values").shape == (2, LAYER, HEAD, 4, 3)
        assert projector(torch.empty(2, LAYER, QHEAD, 4, T_DIM), "queries").shape == (2, LAYER, QHEAD, 4, 3)


def test_what_the_pipeline_may_reorder():
    assert build("linear", 3).linear
    assert not getattr(build("elastic", 3), "linear", False)
