"""Declarations of tiny components, sound ones and ones that break a clause of the contract each."""

from typing import Literal

from kava_core.config import ComponentConfig, KVLossConfig


def _declared(implementation: str, base: type[ComponentConfig] = ComponentConfig) -> type[ComponentConfig]:
    word = implementation.lower()

    class Planted(base):  # type: ignore[valid-type,misc]
        """A planted component."""

        name: Literal[word] = word  # type: ignore[valid-type]
        component = f"tests.meta.planted.components:{implementation}"

    Planted.__name__ = implementation
    return Planted


PROJECTORS = {
    name: _declared(name)
    for name in (
        *("Cropped", "WrongAxis", "WrongDtype", "InPlace", "BatchLeak", "TimeLeak", "Detached"),
        "UnnamedLayers",
        *("FalselyLinear", "FalselyShared", "Noisy", "Forgetful", "Homesick", "PeeksAtPadding"),
        "DividesByNothing",
    )
}
LOSSES = {
    name: _declared(name, KVLossConfig)
    for name in ("Absolute", "MaskLeak", "DetachedLoss", "HalfSum", "LayerLeak", "DetachedWeight")
}
ADAPTERS = {name: _declared(name) for name in ("FirstHeads", "WrongView", "DroppedFold")}
WARPERS = {name: _declared(name) for name in ("Shift", "ReadsPadding", "ReadsNeighbour", "BatchLength")}
MAPPERS = {name: _declared(name) for name in ("First", "SumsToTwo", "Restless")}
FUSERS = {name: _declared(name) for name in ("Equal", "Negative", "SeesMasked", "Peeks")}
