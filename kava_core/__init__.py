"""kava: distil the key-value caches of teachers into a student. Importing this package imports no torch."""

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("kava")
"""Marks a plugin's hook functions: ``from kava_core import hookimpl``."""

__all__ = ["__version__", "hookimpl"]
