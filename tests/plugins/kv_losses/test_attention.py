"""The losses on attention against their definitions in float64, and what their declarations accept."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kava_core.errors import SpecError
from kava_core.protocols.axes import Cache, Geometry
from kava_core.testing import KVLossTests
from kava_core.testing.geometries import GEOMETRIES
from kava_plugins.kv_losses import AttentionKLConfig, AttentionOutputConfig, StructuralConfig, kava_kv_losses
from tests.plugins.kv_losses.attention_helpers import Rows, draw_weight, slow_divergence

torch.set_num_threads(1)
BATCH, LAYER, QHEAD, HEAD, TIME, DIM = 2, 3, 4, 2, 6, 4
GEOMETRY = Geometry(layer=LAYER, head=HEAD, dim=DIM, qhead=QHEAD, hidden=QHEAD * DIM)
ALL = [
    AttentionKLConfig(),
    AttentionKLConfig(kind="jeffreys", temperature=2.0, causal=False),
    AttentionOutputConfig(),
    AttentionOutputConfig(form="mse", temperature=0.5),
    AttentionOutputConfig(causal=False),
    StructuralConfig(),
    StructuralConfig(alpha_k=0, alpha_v=0.5, alpha_attn=2.0, attention_layers=(0, -1), kind="reverse"),
    StructuralConfig(alpha_k=0.3, alpha_v=0),
    StructuralConfig(alpha_attn=0),
]
each_loss = pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)


def build(config):
    return config.build(teacher=GEOMETRY, student=GEOMETRY)


def draw(seed=0, dtype=torch.float64, head=HEAD, qhead=QHEAD, time=TIME, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    heads = {"keys": head, "values": head, "queries": qhead}
    made = {
        p: torch.randn(BATCH, LAYER, h, time, dim, generator=generator).double() for p, h in heads.items()
    }
    return Cache(**made).map(lambda x, _: x.to(dtype).requires_grad_())


def reading(config, cache):
    """What the pipeline hands over: the declared parts, and no others."""
    return cache.pick(config.parts)


def seen_by(weight, b, layer, i, causal):
    return [j for j in range(weight.shape[2]) if weight[b, layer, j] != 0 and (j <= i or not causal)]


def slow_output(cache, b, layer, h, i, seen, temperature):
    q, k, v = (getattr(cache, part)[b, layer].double() for part in ("queries", "keys", "values"))
    group = h * len(k) // len(q)
    scores = torch.stack([q[h, i] @ k[group, j] for j in seen]) / (q.shape[-1] ** 0.5 * temperature)
    return sum(p * v[group, j] for p, j in zip(scores.softmax(0), seen, strict=True))


def slow_cosine(a, b):
    return 1 - (a @ b) / (a.norm() * b.norm())


def slow_attention_output(config, student, target, weight):
    total = 0
    for b, layer, i in weight.nonzero().tolist():
        seen = seen_by(weight, b, layer, i, config.causal)
        each = []
        for h in range(QHEAD):
            mine, theirs = (
                slow_output(c, b, layer, h, i, seen, config.temperature) for c in (student, target)
            )
            each.append(
                slow_cosine(mine, theirs) if config.form == "cosine" else ((mine - theirs) ** 2).mean()
            )
        total = total + weight[b, layer, i] * torch.stack(each).mean()
    return total


def slow_attention_kl(config, student, target, weight, layers=slice(None)):
    sides = (getattr(cache, part)[:, layers] for cache in (student, target) for part in ("queries", "keys"))
    options = {"causal": config.causal, "temperature": config.temperature, "kind": config.kind}
    return slow_divergence(Rows(*sides), weight[:, layers], **options)


def slow_structural(config, student, target, weight):
    total = torch.zeros((), dtype=torch.float64)
    for part, alpha in (("keys", config.alpha_k), ("values", config.alpha_v)):
        for b, layer, i in weight.nonzero().tolist() if alpha else []:
            pairs = zip(*(getattr(c, part)[b, layer, :, i].double() for c in (student, target)), strict=True)
            each = torch.stack([slow_cosine(*pair) for pair in pairs])
            total = total + alpha * weight[b, layer, i] * each.mean()
    if config.alpha_attn:
        layers = list(range(LAYER)) if config.attention_layers == "all" else list(config.attention_layers)
        rows = slow_attention_kl(config, student, target, weight, layers)
        total = total + config.alpha_attn * LAYER / len(layers) * rows
    return total


SLOW = {
    "attention_kl": slow_attention_kl,
    "attention_output": slow_attention_output,
    "structural": slow_structural,
}


def slopes(value, *caches):
    tensors = [x for cache in caches for _, x in cache.items()]
    return torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)


@each_loss
def test_value_and_gradients_are_the_loops(config):
    student, target = (reading(config, draw(seed)) for seed in (0, 1))
    weight = draw_weight(BATCH, LAYER, TIME)
    found, wanted = build(config)(student, target, weight), SLOW[config.name](config, student, target, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(slopes(found, student, target), slopes(wanted, student, target), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_inputs(config, dtype):
    student, target = (reading(config, draw(seed, dtype)) for seed in (0, 1))
    weight = draw_weight(BATCH, LAYER, TIME)
    found = build(config)(student, target, weight.float())
    wanted = SLOW[config.name](config, student, target, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    for mine, theirs in zip(slopes(found, student), slopes(wanted, student), strict=True):
        assert (mine - theirs).norm() <= (1e-4 if dtype == torch.float32 else 8e-3) * theirs.norm()


@each_loss
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_weight_0_has_no_influence(config, junk):
    student, target = (reading(config, draw(seed)) for seed in (0, 1))
    weight = draw_weight(BATCH, LAYER, TIME)
    weight[0, 1], weight[1, 0, 0] = 0, 0
    hole = (weight == 0)[:, :, None, :, None]
    dirty, bad = (c.map(lambda x, _: torch.where(hole, junk, x)) for c in (student, target))
    loss = build(config)
    found, wanted = loss(dirty, bad, weight), loss(student, target, weight)
    assert torch.equal(found, wanted)
    for mine, theirs in zip(slopes(found, dirty, bad), slopes(wanted, student, target), strict=True):
        assert mine.isfinite().all()
        assert not torch.where(hole, mine, 0).any()
        assert torch.equal(mine, torch.where(hole, 0, theirs))


@each_loss
@pytest.mark.parametrize("time", [0, 1, TIME])
def test_nothing_valid_is_exactly_0(config, time):
    student, target = (reading(config, draw(seed, time=time)) for seed in (0, 1))
    found = build(config)(student, target, torch.zeros(BATCH, LAYER, time))
    assert found == 0
    assert not any(x.any() for x in slopes(found, student, target))


@each_loss
def test_one_position_attends_to_itself(config):
    student, target = (reading(config, draw(seed, time=1)) for seed in (0, 1))
    weight = torch.ones(BATCH, LAYER, 1).double()
    found = build(config)(student, target, weight)
    torch.testing.assert_close(found, SLOW[config.name](config, student, target, weight))


@each_loss
def test_examples_add_up_and_padding_changes_nothing(config):
    student, target = (reading(config, draw(seed)) for seed in (0, 1))
    weight, loss = draw_weight(BATCH, LAYER, TIME), build(config)
    whole = loss(student, target, weight)
    rows = [loss(*(c.map(lambda x, _: x[b : b + 1]) for c in (student, target)), weight[b : b + 1])  # noqa: B023
            for b in range(BATCH)]  # fmt: skip
    torch.testing.assert_close(torch.stack(rows).sum(), whole)
    pad = torch.nn.functional.pad
    padded = (c.map(lambda x, _: pad(x, (0, 0, 3, 2), value=1.7)) for c in (student, target))
    torch.testing.assert_close(loss(*padded, pad(weight, (3, 2))), whole)


@each_loss
def test_zero_vectors_and_equal_sides_have_finite_gradients(config):
    some, weight, loss = reading(config, draw(1)), torch.ones(BATCH, LAYER, TIME), build(config)
    zero = some.map(lambda x, _: torch.zeros_like(x).requires_grad_())
    for student, target in (
        (zero, some),
        (some, zero),
        (zero, zero),
        (some, some.map(lambda x, _: x.detach())),
    ):
        found = loss(student, target, weight)
        assert found.isfinite()
        assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in slopes(found, student))


@each_loss
def test_meta_shapes(config):
    student, target = (reading(config, draw(seed)).map(lambda x, _: x.to("meta")) for seed in (0, 1))
    assert build(config)(student, target, torch.ones(BATCH, LAYER, TIME, device="meta")).shape == ()


def test_a_longer_batch_of_outputs_is_the_whole_maps():
    """Fused kernels work in blocks; a left-padded example beside a full one, in float32."""
    student, target = (draw(seed, torch.float32, time=300) for seed in (0, 1))
    weight = torch.ones(BATCH, LAYER, 300)
    weight[0, :, :130] = 0
    wanted = 0
    outputs = []
    for cache in (student, target):
        keys, values = (x.double().repeat_interleave(2, 2) for x in (cache.keys, cache.values))
        dead = (weight == 0)[:, :, None, None, :] | torch.ones(300, 300, dtype=torch.bool).triu(1)
        scores = (cache.queries.double() @ keys.mT / DIM**0.5).masked_fill(dead, -1e30)
        outputs.append(scores.softmax(-1) @ values)
    wanted = ((1 - torch.cosine_similarity(*outputs, dim=-1)).mean(2) * weight).sum()
    found = build(AttentionOutputConfig())(student, target, weight)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_parts_follow_from_the_alphas():
    assert StructuralConfig().parts == ("keys", "values", "queries")
    assert StructuralConfig(alpha_attn=0).parts == ("keys", "values")
    assert StructuralConfig(alpha_attn=0, alpha_k=0).parts == ("values",)
    assert StructuralConfig(alpha_k=0, alpha_v=0).parts == ("keys", "queries")
    assert StructuralConfig(alpha_attn=0, parts=("keys", "values")).parts == ("keys", "values")
    config = StructuralConfig(alpha_v=0)
    assert StructuralConfig.model_validate_json(config.model_dump_json()) == config


def test_parts_that_do_not_follow_are_refused():
    with pytest.raises(
        ValidationError, match="these alphas compare keys, values, queries: leave 'parts' out"
    ):
        StructuralConfig(parts=("keys",))
    with pytest.raises(ValidationError, match="all 0: nothing is compared"):
        StructuralConfig(alpha_k=0, alpha_v=0, alpha_attn=0)
    with pytest.raises(ValidationError):
        AttentionKLConfig(parts=("keys", "values"))
    with pytest.raises(ValidationError):
        AttentionOutputConfig(parts=("keys", "queries"))


def test_attention_layers_must_exist():
    with pytest.raises(SpecError, match=r"attention_layers \[3, -4\]: the loss looks at 3 layers"):
        build(StructuralConfig(attention_layers=(0, 3, -4)))


def test_query_heads_must_agree():
    with pytest.raises(SpecError, match="the student has 4, the target 8; use a head_adapter"):
        AttentionKLConfig().build(teacher=GEOMETRY.with_(qhead=8), student=GEOMETRY)


def test_own_widths_and_key_heads():
    student, target = draw(0), draw(1, head=4, dim=7)
    weight = draw_weight(BATCH, LAYER, TIME)
    config = AttentionKLConfig()
    loss = config.build(teacher=GEOMETRY.with_(head=4, dim=7), student=GEOMETRY)
    torch.testing.assert_close(
        loss(student, target, weight), slow_attention_kl(config, student, target, weight)
    )


def test_they_are_registered():
    names = {one.component_name() for one in kava_kv_losses()}
    assert {"attention_kl", "attention_output", "structural"} <= names


class TestKitOfAttentionKL(KVLossTests):
    """Sides with equal query heads; widths and key heads are their own."""

    refuses = tuple(name for name, (t, s) in GEOMETRIES.items() if t.qhead != s.qhead)

    @pytest.fixture(params=[AttentionKLConfig(), AttentionKLConfig(kind="jeffreys", causal=False)])
    def config(self, request):
        return request.param


class TestKitOfTheOthers(KVLossTests):
    """Target and student alike."""

    @pytest.fixture(
        params=[
            AttentionOutputConfig(),
            AttentionOutputConfig(form="mse"),
            StructuralConfig(attention_layers=(-1,)),
        ]
    )
    def config(self, request):
        return request.param
