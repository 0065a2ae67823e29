"""Layer mappers against the formula, and the layers of a known pair."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from kava_core.kv.axes import Geometry
from kava_plugins.layer_mappers import kava_layer_mappers


def build(t_layer, layer, **fields):
    [declaration] = [one for one in kava_layer_mappers() if one.component_name() == "ratio"]
    shape = {"head": 1, "dim": 2, "qhead": 1, "hidden": 4}
    return declaration(**fields).build(
        teacher=Geometry(layer=t_layer, **shape), student=Geometry(layer=layer, **shape)
    )


@pytest.mark.parametrize("t_layer", [1, 2, 3, 4, 7, 24, 28])
@pytest.mark.parametrize("layer", [1, 2, 3, 5, 12, 28, 40])
def test_ratio_is_the_formula(t_layer, layer):
    wanted = torch.zeros(layer, t_layer)
    for i in range(layer):
        depth = math.floor(Fraction((i + 1) * t_layer, layer) + Fraction(1, 2)) - 1
        wanted[i, min(max(depth, 0), t_layer - 1)] = 1
    assert torch.equal(build(t_layer, layer)(), wanted)


@pytest.mark.parametrize(
    ("t_layer", "layer", "read"),
    [(4, 2, [1, 3]), (28, 4, [6, 13, 20, 27]), (2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (5, 1, [4])],
)
def test_ratio_of_known_pairs(t_layer, layer, read):
    assert build(t_layer, layer)().argmax(1).tolist() == read


@pytest.mark.parametrize(
    ("sources", "rows"),
    [(2, [[0, 1], [2, 3], [4, 5]]), (3, [[0, 1, 2], [2, 3, 4], [3, 4, 5]]), (9, [[0, 1, 2, 3, 4, 5]] * 3)],
)
def test_sources_are_averaged(sources, rows):
    wanted = torch.zeros(3, 6)
    for i, row in enumerate(rows):
        wanted[i, row] = 1 / len(row)
    torch.testing.assert_close(build(6, 3, sources=sources)(), wanted)
    assert (build(6, 3, sources=sources)().sum(1) - 1).abs().max() < 1e-6
