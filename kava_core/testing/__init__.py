"""Provide the conformance kit: subclass the class of your component's kind and give it your declaration.

::

    import pytest
    from kava_core.testing import LayerMapperTests
    from my_plugin import MyMapperConfig

    class TestMyMapper(LayerMapperTests):
        @pytest.fixture
        def config(self):
            return MyMapperConfig()

Every test states one clause of the contract in ``kava_core.protocols``. A clause that your component breaks
on purpose is switched off by name, where a reader sees it: ``test_examples_are_independent = None``.
Needs pytest (``pip install 'kava[testing]'``).
"""

from __future__ import annotations

from kava_core.testing.component import ComponentTests
from kava_core.testing.dim_projector import DimProjectorTests
from kava_core.testing.fuser import FuserTests
from kava_core.testing.geometries import Sides
from kava_core.testing.head_adapter import HeadAdapterTests
from kava_core.testing.kv_loss import KVLossTests
from kava_core.testing.layer_mapper import LayerMapperTests
from kava_core.testing.time_warper import TimeWarperTests
from kava_core.testing.timelines import timeline

__all__ = [
    "ComponentTests",
    "DimProjectorTests",
    "FuserTests",
    "HeadAdapterTests",
    "KVLossTests",
    "LayerMapperTests",
    "Sides",
    "TimeWarperTests",
    "timeline",
]
