"""kava: distil the key-value caches of teachers into a student. Importing this package imports no torch."""

import os

import pluggy

from kava_core.moved import find_moved_modules

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("kava")
"""Marks a plugin's hook functions: ``from kava_core import hookimpl``."""

find_moved_modules()

if os.environ.get("KAVA_SHAPE_CHECK", "") not in ("", "0"):
    from kava_core.shapecheck import enable

    enable()

__all__ = ["__version__", "hookimpl"]
