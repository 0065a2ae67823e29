"""Keep import paths of plugins from before the packages were rearranged, with a warning naming the new path.

One release only: delete this file, its two uses and its test with the next one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "kava_core.kv.axes": "kava_core.protocols.axes",
    "kava_core.kv.cka": "kava_core.kv.maths.cka",
    "kava_core.kv.masks": "kava_core.kv.maths.masks",
    "kava_core.kv.moments": "kava_core.kv.maths.moments",
    "kava_core.kv.resample": "kava_core.kv.maths.resample",
    "kava_core.kv.timeline": "kava_core.protocols.timeline",
    "kava_core.kv.timemap": "kava_core.protocols.time_map",
    "kava_core.kv.weighted_rows": "kava_core.protocols.weighted_rows",
}
"""Modules that a plugin could import, old path to new."""

NAMES = {
    "kava_core.protocols": {
        "Calibrated": "kava_core.protocols.dim_projector",
        "Chooses": "kava_core.protocols.fuser",
        "DimProjector": "kava_core.protocols.dim_projector",
        "Evictor": "kava_core.protocols.time_warper",
        "Fuser": "kava_core.protocols.fuser",
        "FusionContext": "kava_core.protocols.fuser",
        "HeadAdapter": "kava_core.protocols.head_adapter",
        "KVLoss": "kava_core.protocols.kv_loss",
        "LayerMapper": "kava_core.protocols.layer_mapper",
        "Measured": "kava_core.protocols.layer_mapper",
        "ObservesCaches": "kava_core.protocols.kv_loss",
        "ObservesTeachers": "kava_core.protocols.fuser",
        "Regularised": "kava_core.protocols.fuser",
        "Rewarded": "kava_core.protocols.fuser",
        "Scores": "kava_core.protocols.time_warper",
        "TimeWarper": "kava_core.protocols.time_warper",
    }
}
"""Names that a plugin could import from a module, to the module that holds each now."""


class _MovedModuleFinder(MetaPathFinder):
    """Finds a module under its old path; stands last, so that only paths without a file reach it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an alias, and warn; None for every path that was never kava's."""
        if fullname not in MODULES:
            return None
        _warn(fullname, MODULES[fullname], stacklevel=3)
        return ModuleSpec(fullname, _AliasLoader(MODULES[fullname]))


class _AliasLoader(Loader):
    """Makes a module whose every name is looked up in another one."""

    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        """Let the alias answer with the very objects of the new module: classes stay the same classes."""
        found = import_module(self.new)
        module.__doc__ = found.__doc__
        module.__dict__["__getattr__"] = lambda name: getattr(found, name)


def find_moved_modules() -> None:
    """Let the import system find modules under their old paths; calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModuleFinder())


def moved_name(module: str, name: str) -> Any:
    """Return what ``module`` once held under this name, and warn.

    Raises:
        AttributeError: it never did; worded as Python words it.
    """
    new = NAMES.get(module, {}).get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{new}.{name}", stacklevel=4)
    return getattr(import_module(new), name)


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is now {new}; the old path will be gone in kava 0.2",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
