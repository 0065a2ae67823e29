"""Eviction by importance and redundancy against loops over examples, layers, heads and tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import RkvConfig
from kava_plugins.time_warpers._reasoning import highest_positions
from kava_plugins.time_warpers.rkv import redundancy_scores
from tests.support.pipeline_helpers import timeline

torch.set_num_threads(1)
GEOMETRY = Geometry(layer=2, head=2, dim=5, qhead=6, hidden=30)
SIZES = [(3, 7, 4), (2, 5, 1), (4, 3, 2), (1, 1, 3), (2, 0, 3), (3, 4, 0)]
"""Tokens of prompt, reasoning and answer: also one or no reasoning token, and no answer. Not two: they are as
like one another as the other way round, so λ = 0 leaves them to rounding."""


def warper(weight=0.1):
    return RkvConfig(weight=weight).build(teacher=GEOMETRY, student=GEOMETRY)


def padded(sizes, *, left=2, right=1):
    """Timelines padded on both sides, and a cache with NaN in the padding."""
    line = timeline(*sizes, left=left, right=right)
    return line, cache_of(line)


def cache_of(line, dtype=torch.float64, geometry=GEOMETRY):
    """The same numbers for a token wherever it stands."""
    batch, longest = len(line.mask), 64
    index, real = line.positions[:, None, None, :, None], line.mask[:, None, None, :, None]
    parts = {}
    for seed, part in enumerate(("keys", "values", "queries")):
        shape = (batch, geometry.layer, geometry.heads(part), longest, geometry.dim)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parts[part] = torch.where(real, drawn.take_along_dim(index, 3), torch.nan).to(dtype)
    return Cache(**parts)


def of_head(cache, line, b, layer, head):
    """Places of the reasoning, its keys, and the queries of the answer for each query head of the group."""
    at, answer = ((line.segments[b] == segment).nonzero().flatten().tolist() for segment in (1, 2))
    group = GEOMETRY.qhead // GEOMETRY.head
    queries = [
        [cache.queries[b, layer, q, a] for a in answer] for q in range(head * group, head * group + group)
    ]
    return at, [cache.keys[b, layer, head, j] for j in at], queries


def softmax(numbers):
    powers = [math.exp(x) for x in numbers]
    return [x / sum(powers) for x in powers]


def slow_importance(keys, queries):
    means = []
    for of_head in queries:
        rows = [softmax([float(q @ k) / math.sqrt(len(k)) for k in keys]) for q in of_head]
        means.append([sum(row[j] for row in rows) / max(len(rows), 1) for j in range(len(keys))])
    return [max(mean[j] for mean in means) for j in range(len(keys))]


def slow_redundancy(keys):
    def cosine(x, y):
        return float(x @ y / (x.norm() * y.norm()))

    count = len(keys)
    means = [
        sum(cosine(keys[i], keys[j]) for j in range(count) if j != i) / max(count - 1, 1)
        for i in range(count)
    ]
    return softmax([-mean for mean in means])


def slow_scores(cache, line, b, layer, head):
    at, keys, queries = of_head(cache, line, b, layer, head)
    return at, slow_importance(keys, queries), slow_redundancy(keys)


HEADS = [(b, layer, head) for b in range(len(SIZES)) for layer in range(2) for head in range(2)]


@pytest.mark.parametrize("place", range(2))
def test_scores_are_the_formulas(place):
    line, cache = padded(SIZES)
    found = list(warper().scores(cache, line).values())[place]
    for b, layer, head in HEADS:
        at, *wanted = slow_scores(cache, line, b, layer, head)
        whole = torch.full((line.mask.shape[1],), -torch.inf, dtype=torch.float64)
        whole[at] = torch.tensor(wanted[place], dtype=torch.float64)
        torch.testing.assert_close(found[b, layer, head], whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_highest_scores_are_kept_in_time_order(weight, count):
    line, cache = padded(SIZES)
    found = warper(weight).choose(cache, line, count)
    assert found.shape == (len(SIZES), 2, 2, count)
    assert found.ge(0).all()
    assert found.lt(line.mask.shape[1]).all()
    for b, layer, head in HEADS:
        at, importance, unlike = slow_scores(cache, line, b, layer, head)
        score = [weight * i + (1 - weight) * r for i, r in zip(importance, unlike, strict=True)]
        order = sorted(range(len(at)), key=lambda j: (round(-score[j], 12), j))
        wanted = sorted(at[j] for j in order[:count])
        assert found[b, layer, head, : len(wanted)].tolist() == wanted


def test_layers_and_heads_keep_other_tokens():
    line, cache = padded([(2, 30, 3)])
    found = warper().choose(cache, line, 5).flatten(0, 2)
    assert len(set(map(tuple, found.tolist()))) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_of_float32_at_least(dtype):
    """Half precision is widened first: what is left is the rounding of the inputs themselves."""
    line, cache = padded(SIZES)
    low = cache.map(lambda x, _: x.to(dtype))
    wanted = warper().scores(low.map(lambda x, _: x.double()), line)
    for name, score in warper().scores(low, line).items():
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_an_example_alone_is_as_in_a_batch():
    line, cache = padded(SIZES)
    together = warper().choose(cache, line, 4)
    for b, (_, reasoning, _) in enumerate(SIZES):
        row = slice(b, b + 1)
        alone_line = Timeline(line.mask[row], line.positions[row], line.segments[row], line.spans[row])
        alone = warper().choose(cache.map(lambda x, _: x[row]), alone_line, 4)  # noqa: B023
        assert torch.equal(alone[0, :, :, :reasoning], together[b, :, :, :reasoning])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 5), (3, 4)])
def test_padding_changes_nothing(left, right):
    first = timeline(*SIZES)
    wanted = warper().choose(cache_of(first), first, 4)
    line = timeline(*SIZES, left=left, right=right)
    found = warper().choose(cache_of(line), line, 4) - left
    for b, (_, reasoning, _) in enumerate(SIZES):
        assert torch.equal(found[b, :, :, :reasoning], wanted[b, :, :, :reasoning])


def test_of_fewer_tokens_than_slots_all_are_kept():
    line, cache = padded([(2, 3, 2)])
    found = warper().choose(cache, line, 5)
    at = (line.segments[0] == 1).nonzero().flatten()
    assert (found[..., :3] == at).all()
    assert warper()(line, timeline((0, 5, 0))).valid.tolist() == [[True] * 3 + [False] * 2]


@pytest.mark.parametrize("sizes", [[(2, 0, 2)], [(2, 0, 0), (1, 0, 1)], [(0, 1, 0)]])
def test_nothing_to_choose_from_is_no_error(sizes):
    line, cache = padded(sizes)
    found = warper().choose(cache, line, 3)
    assert found.shape[3] == 3
    scores = warper().scores(cache, line)
    assert not any(score.isnan().any() for score in scores.values())


def test_no_positions_and_no_slots():
    empty = Timeline(
        torch.zeros(2, 0, dtype=torch.bool),
        *(torch.zeros(2, 0, dtype=torch.long) for _ in range(2)),
        torch.zeros(2, 0, 2, dtype=torch.long),
    )
    assert warper().choose(cache_of(empty), empty, 3).shape == (2, 2, 2, 3)
    line, cache = padded(SIZES)
    assert warper().choose(cache, line, 0).shape == (len(SIZES), 2, 2, 0)


def test_no_matrix_of_pairs_is_made():
    """20,000 tokens: their pairs alone would be 1.6 GB a head."""
    keys, real = torch.randn(1, 1, 1, 20_000, 4), torch.ones(1, 20_000, dtype=torch.bool)
    found = redundancy_scores(keys, real)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_a_zero_key_is_finite():
    keys = torch.zeros(1, 1, 1, 3, 4)
    assert torch.equal(
        redundancy_scores(keys, torch.ones(1, 3, dtype=torch.bool)), torch.full((1, 1, 1, 3), 1 / 3)
    )


def test_of_equal_scores_the_earlier_is_kept():
    scores = torch.tensor([-torch.inf, 1, 2, 1, 2, 1, -torch.inf])[None, None, None]
    assert highest_positions(scores, 3).tolist() == [[[[1, 2, 4]]]]


def test_a_repeated_key_is_dropped_first():
    """Two tokens with the same key are like one another; with λ = 0 neither is among the first kept."""
    line = timeline((1, 6, 1))
    keys = torch.eye(8, dtype=torch.float64)[None, None, None].clone()
    keys[..., 3, :] = keys[..., 5, :]
    cache = Cache(keys=keys, queries=torch.zeros_like(keys))
    assert warper(0.0).choose(cache, line, 4).tolist() == [[[[1, 2, 4, 6]]]]


def test_what_the_answer_looks_at_is_kept():
    """With λ = 1 the answer's queries decide, whatever the prompt's would say."""
    line = timeline((1, 6, 2))
    keys = torch.eye(9, dtype=torch.float64)[None, None, None].clone()
    queries = torch.zeros_like(keys)
    queries[..., 7, 2], queries[..., 8, 5] = 30.0, 30.0
    queries[..., 0, 4] = 1e3
    assert warper(1.0).choose(Cache(keys=keys, queries=queries), line, 2).tolist() == [[[[2, 5]]]]
