"""The kit over every planted component. Named so that only ``test_kit.py`` runs it."""

from __future__ import annotations

import pytest

from kava_core.testing import (
    DimProjectorTests,
    FuserTests,
    HeadAdapterTests,
    KVLossTests,
    LayerMapperTests,
    TimeWarperTests,
)
from tests.meta import planted

KITS = {
    DimProjectorTests: planted.PROJECTORS,
    KVLossTests: planted.LOSSES,
    HeadAdapterTests: planted.ADAPTERS,
    TimeWarperTests: planted.WARPERS,
    LayerMapperTests: planted.MAPPERS,
    FuserTests: planted.FUSERS,
}


def suite(kit, declaration):
    @pytest.fixture
    def config(self):
        return declaration()

    return type(f"Test{declaration.__name__}", (kit,), {"config": config})


for kit, declarations in KITS.items():
    for declaration in declarations.values():
        globals()[f"Test{declaration.__name__}"] = suite(kit, declaration)
