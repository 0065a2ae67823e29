"""The checks that the old scripts' guides told people to run, on the components that replaced them.

Guides: heads 12 → 2 and 28 → 2, width 128 → 64, 80 → 50 positions, one position, none, and any two head
counts among the usual ones. Earlier names: KVProjector, safe_time_resample, build_safe_linear_indices.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from kava_core.kv.maths.resample import safe_linear_indices, safe_time_resample
from kava_core.protocols.axes import Geometry
from kava_core.protocols.timeline import Timeline
from kava_plugins.dim_projectors import ElasticConfig
from kava_plugins.dim_projectors import LinearConfig as LinearProjector
from kava_plugins.head_adapters import FlatConfig, StructuredConfig
from kava_plugins.time_warpers import LinearConfig as LinearWarper

torch.set_num_threads(1)
HEADS = (2, 4, 8, 12, 16, 28, 32, 64)
PAIRS = list(itertools.product(HEADS, HEADS))
LENGTHS = [(80, 50), (50, 80), (1, 1), (1, 50), (80, 1), (80, 80)]
BATCH, LAYER = 2, 3


def sides(t_head, head, t_dim=128, dim=64):
    teacher = Geometry(layer=LAYER, head=t_head, dim=t_dim, qhead=0, hidden=t_head * t_dim)
    return {"teacher": teacher, "student": teacher.with_(head=head, dim=dim)}


def cache(head, time, dim, seed=0):
    return torch.randn(BATCH, LAYER, head, time, dim, generator=torch.Generator().manual_seed(seed))


def timeline(length, time):
    """Real tokens first, then padding, up to ``time`` positions."""
    mask = (torch.arange(time) < length).expand(BATCH, -1)
    segments = torch.where(mask, 0, -1)
    spans = torch.zeros(BATCH, time, 2, dtype=torch.long)
    return Timeline(mask=mask, positions=torch.arange(time) * mask, segments=segments, spans=spans)


def mix_of(adapter, t_head):
    """``[layer, head, t_head]``: what becomes of teacher heads that are unit vectors."""
    return adapter(torch.eye(t_head)[None, None, :, None].expand(1, LAYER, -1, 1, -1), "keys")[0, :, :, 0]


def old_resample(x, time):
    """The old guides' own rule: positions of torch.linspace from the first to the last, interpolated."""
    place = torch.linspace(0, x.shape[-2] - 1, time, dtype=torch.float64)
    if time == 1:
        place = torch.tensor([(x.shape[-2] - 1) / 2], dtype=torch.float64)
    low, high = place.floor().long(), place.ceil().long()
    share = (place - low)[:, None]
    return (1 - share) * x[..., low, :].double() + share * x[..., high, :].double()


@pytest.mark.parametrize("t_head", [12, 28])
@pytest.mark.parametrize("init", ["grouped", "uniform", "random"])
@pytest.mark.parametrize("share_kv", [False, True])
def test_few_heads_of_half_the_width(t_head, init, share_kv):
    """12 → 2 and 28 → 2 with 128 → 64, as for Qwen2.5-7B and its 0.5B student."""
    geometry = sides(t_head, 2)
    adapter = StructuredConfig(init=init, share_kv=share_kv).build(**geometry)
    projector = LinearProjector(share_kv=share_kv).build(
        teacher=adapter.teacher_view, student=geometry["student"]
    )
    for part in ("keys", "values"):
        x = cache(t_head, 20, 128)
        found = projector(adapter(x, part), part)
        assert found.shape == (BATCH, LAYER, 2, 20, 64)
        matrix = getattr(projector, projector.owner[part])[:, 0]
        mixed = (
            torch.einsum("lij,bljtd->blitd", mix_of(adapter, t_head), x)
            if part == "keys"
            else adapter(x, part)
        )
        torch.testing.assert_close(
            found, torch.einsum("blitd,led->blite", mixed, matrix), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("t_head", "head"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
def test_any_two_head_counts(t_head, head):
    """Shape, rows that sum to 1, and a mean over heads that stays."""
    x = cache(t_head, 5, 8).double()
    for init in ("grouped", "uniform", "random"):
        adapter = StructuredConfig(init=init).build(**sides(t_head, head, 8, 8))
        found, mix = adapter(x, "keys"), mix_of(adapter, t_head)
        assert found.shape == (BATCH, LAYER, head, 5, 8)
        torch.testing.assert_close(mix.sum(-1), torch.ones(LAYER, head))
        assert mix.min() >= 0
        if init != "random":
            torch.testing.assert_close(found.mean(2), x.mean(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t_head", "head"), [(12, 2), (28, 2), (2, 28)])
def test_a_constant_over_heads_passes_any_mix(t_head, head):
    x = cache(1, 4, 8).expand(-1, -1, t_head, -1, -1)
    for init in ("grouped", "uniform", "random"):
        found = StructuredConfig(init=init).build(**sides(t_head, head, 8, 8))(x, "values")
        torch.testing.assert_close(found, x[:, :, :1].expand(-1, -1, head, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("t_time", "time"), LENGTHS)
@pytest.mark.parametrize("lead", [(2,), (2, 3), (2, 3, 4)])
def test_safe_time_resample(t_time, time, lead):
    x = torch.randn(*lead, t_time, 6, generator=torch.Generator().manual_seed(1))
    found = safe_time_resample(x, time)
    assert (found.shape, found.dtype, found.device) == ((*lead, time, 6), x.dtype, x.device)
    torch.testing.assert_close(found.double(), old_resample(x, time), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(2,), (2, 3), (2, 3, 4)])
def test_nothing_to_resample_gives_zeros(lead):
    found = safe_time_resample(torch.randn(*lead, 0, 6), 50)
    assert torch.equal(found, torch.zeros(*lead, 50, 6))


def test_one_position_is_repeated_and_one_wanted_is_the_middle():
    x = torch.randn(2, 3, 4, 1, 6)
    assert torch.equal(safe_time_resample(x, 50), x.expand(-1, -1, -1, 50, -1))
    x = torch.randn(2, 3, 4, 81, 6)
    assert torch.equal(safe_time_resample(x, 1)[..., 0, :], x[..., 40, :])


@pytest.mark.parametrize(("t_time", "time"), [*LENGTHS, (0, 5), (5, 0), (32768, 7777)])
def test_build_safe_linear_indices(t_time, time):
    """Long, clamped, rising, first to last."""
    indices = safe_linear_indices(t_time, time)
    assert indices.dtype == torch.long
    assert indices.shape == (time,)
    assert ((indices >= 0) & (indices <= max(t_time - 1, 0))).all()
    assert (indices.diff() >= 0).all()
    if time > 1:
        assert indices[[0, -1]].tolist() == [0, max(t_time - 1, 0)]
    x = torch.randn(2, max(t_time, 1), 3)
    assert x[:, indices].shape == (2, time, 3)


@pytest.mark.parametrize(("t_time", "time"), LENGTHS)
@pytest.mark.parametrize("t_head", [12, 28])
def test_heads_width_and_time_together(t_time, time, t_head):
    """Projection, then resampling; the other order gives the same, and so does the old function."""
    geometry = sides(t_head, 2)
    adapter = StructuredConfig().build(**geometry)
    projector = LinearProjector().build(teacher=adapter.teacher_view, student=geometry["student"])
    warp = LinearWarper().build(**geometry)(timeline(t_time, t_time), timeline(time, time))
    x = cache(t_head, t_time, 128)
    found = warp.apply(projector(adapter(x, "keys"), "keys"))
    assert found.shape == (BATCH, LAYER, 2, time, 64)
    assert warp.valid.all()
    other = projector(adapter(warp.apply(x), "keys"), "keys")
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(safe_time_resample(projector(adapter(x, "keys"), "keys"), time)).all()


def test_a_teacher_without_tokens_leaves_nothing_to_compare():
    geometry = sides(12, 2)
    adapter = StructuredConfig().build(**geometry)
    projector = LinearProjector().build(teacher=adapter.teacher_view, student=geometry["student"])
    warp = LinearWarper().build(**geometry)(timeline(0, 0), timeline(50, 50))
    found = warp.apply(projector(adapter(cache(12, 0, 128), "keys"), "keys"))
    assert found.shape == (BATCH, LAYER, 2, 50, 64)
    assert not found.any()
    assert not warp.valid.any()


def test_padding_does_not_reach_the_resampled_cache():
    geometry = sides(12, 2)
    adapter, warper = StructuredConfig().build(**geometry), LinearWarper().build(**geometry)
    x = cache(12, 80, 128)
    padded = torch.cat([x, torch.full_like(x, torch.nan)], 3)
    alone = warper(timeline(80, 80), timeline(50, 50)).apply(adapter(x, "keys"))
    among = warper(timeline(80, 160), timeline(50, 70))
    found = among.apply(adapter(padded, "keys"))
    torch.testing.assert_close(found[:, :, :, :50], alone, rtol=1e-5, atol=1e-5)
    assert not found[:, :, :, 50:].any()
    assert not among.valid[:, 50:].any()


@pytest.mark.parametrize("t_head", [12, 28])
def test_structured_and_flat_are_one_word_apart(t_head):
    """kv_projection_mode: the same projector serves both; flat needs far more parameters."""
    sizes = {}
    for word in (StructuredConfig(), FlatConfig(), FlatConfig(layers=True)):
        adapter = word.build(**sides(t_head, 2, 16, 8))
        projector = LinearProjector().build(teacher=adapter.teacher_view, student=adapter.student_view)
        x, own = cache(t_head, 6, 16), cache(2, 6, 8, seed=1)
        assert projector(adapter(x, "keys"), "keys").shape == adapter.fold(own).shape
        sizes[str(word)] = sum(one.numel() for one in projector.parameters())
    structured, flat, flat_layers = sizes.values()
    assert flat == structured * t_head * 2
    assert flat_layers == flat * LAYER


def test_the_elastic_bottleneck_of_a_7b_teacher():
    """LayerNorm → Linear → SiLU → Dropout → Linear, as wide inside as the student's heads."""
    geometry = sides(28, 2)
    assert geometry["teacher"].hidden == 3584
    adapter = StructuredConfig().build(**geometry)
    projector = ElasticConfig().build(teacher=adapter.teacher_view, student=geometry["student"])
    assert projector.keys_down.shape == (LAYER, 1, 64, 128)
    assert projector.keys_up.shape == (LAYER, 1, 64, 64)
    assert projector(adapter(cache(28, 20, 128), "keys"), "keys").shape == (BATCH, LAYER, 2, 20, 64)
