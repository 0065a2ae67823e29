"""The mapper: kava's conformance kit, its formula, and its name in the registry."""

import pytest
from kava_last_layers import LastLayersConfig

from kava_core.protocols.axes import Geometry
from kava_core.registry import Registry
from kava_core.testing import LayerMapperTests


class TestLastLayers(LayerMapperTests):
    @pytest.fixture
    def config(self):
        return LastLayersConfig()


@pytest.mark.parametrize(("t_layer", "layer"), [(6, 2), (4, 4), (2, 5), (1, 1)])
def test_last_layers_meet(t_layer, layer):
    teacher, student = (Geometry(layer=n, head=2, dim=4, qhead=4, hidden=16) for n in (t_layer, layer))
    matrix = LastLayersConfig().build(teacher=teacher, student=student)()
    wanted = [[float(j == max(t_layer - layer + i, 0)) for j in range(t_layer)] for i in range(layer)]
    assert matrix.tolist() == wanted


def test_registered():
    assert Registry.build().get("layer_mapper", "last_layers") is LastLayersConfig
