"""``random``, ``uniform`` and ``crop``: what eviction is compared with."""

from __future__ import annotations

import pytest
import torch

from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.time_warpers import CropConfig, RandomConfig, UniformConfig
from tests.support.pipeline_helpers import timeline

torch.set_num_threads(1)
GEOMETRY = Geometry(layer=3, head=2, dim=4, qhead=2, hidden=8)
SIZES = [(3, 9, 2), (1, 4, 1), (2, 1, 2), (2, 0, 2), (0, 5, 0)]


def built(declaration):
    return declaration().build(teacher=GEOMETRY, student=GEOMETRY)


def drawn(line, count, seed=0):
    torch.manual_seed(seed)
    keys = torch.full((len(line.mask), GEOMETRY.layer, GEOMETRY.head, line.mask.shape[1], 4), torch.nan)
    return built(RandomConfig).choose(Cache(keys=keys), line, count)


def reasoning_of(line, b):
    return (line.segments[b] == 1).nonzero().flatten().tolist()


@pytest.mark.parametrize("count", [1, 4, 7])
def test_random_draws_reasoning_tokens_without_replacement(count):
    line = timeline(*SIZES, left=2, right=1)
    found = drawn(line, count)
    for b in range(len(SIZES)):
        at = reasoning_of(line, b)
        for row in found[b].flatten(0, 1)[:, : min(count, len(at))].tolist():
            assert set(row) <= set(at)
            assert row == sorted(set(row))


def test_random_keeps_all_tokens_where_there_are_few():
    line = timeline((3, 4, 2), left=1)
    assert (drawn(line, 6)[..., :4] == torch.tensor(reasoning_of(line, 0))).all()


def test_random_draws_for_every_layer_head_and_step_anew():
    line = timeline((0, 60, 0))
    one, again, other = drawn(line, 6), drawn(line, 6), drawn(line, 6, seed=1)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(row) for row in one.flatten(0, 2).tolist()}) == 6


def test_random_draws_every_token_equally_often():
    """Of 6 tokens 2 are kept: each in a third of 6,000 draws, within five standard deviations."""
    line = timeline(*[(1, 6, 1)] * 1000)
    counts = torch.bincount(drawn(line, 2).flatten(), minlength=8)
    assert counts[[0, 7]].tolist() == [0, 0]
    assert ((counts[1:7] - 2000).abs() < 5 * (6000 * 2 / 9) ** 0.5).all()


def slow_map(teacher, student, read):
    dense = torch.zeros(*student.mask.shape, teacher.mask.shape[1])
    for b in range(len(dense)):
        theirs, mine = reasoning_of(teacher, b), reasoning_of(student, b)
        for k, place in enumerate(mine[: len(theirs)]):
            dense[b, place, theirs[read(k, len(mine), len(theirs))]] = 1
    return dense


def evenly(k, count, tokens):
    return k if tokens < count else int((k + 0.5) * tokens / count)


STUDENTS = {
    "latent": timeline(*[(0, 4, 0)] * len(SIZES)),
    "text": timeline((1, 3, 1), (2, 6, 0), (1, 1, 1), (1, 2, 3), (4, 0, 1), left=1, right=2),
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize(
    ("declaration", "read"),
    [(UniformConfig, evenly), (CropConfig, lambda k, count, tokens: k)],
    ids=["uniform", "crop"],
)
def test_the_same_tokens_of_all_layers(declaration, read, student):
    teacher = timeline(*SIZES, left=2, right=1)
    found, wanted = built(declaration)(teacher, student), slow_map(teacher, student, read)
    assert torch.equal(found.dense(teacher.mask.shape[1]), wanted)
    assert torch.equal(found.valid, wanted.sum(2) > 0)


def test_evictors_map_slot_to_token():
    """A latent student costs nothing; beside other text the k-th reasoning token reads slot k."""
    teacher = timeline((2, 3, 1), (2, 9, 1))
    latent = built(RandomConfig)(teacher, timeline((0, 4, 0), (0, 4, 0)))
    assert latent.identity
    assert latent.valid.tolist() == [[True, True, True, False], [True] * 4]
    text = built(RandomConfig)(teacher, timeline((1, 4, 1), (2, 3, 1)))
    wanted = torch.zeros(2, 6, 6)
    wanted[0, [1, 2, 3], [0, 1, 2]] = 1
    wanted[1, [2, 3, 4], [0, 1, 2]] = 1
    assert torch.equal(text.dense(6), wanted)
