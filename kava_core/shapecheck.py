"""Check shapes and types of tensors in debug mode, third-party plugins included.

Off, nothing is hooked and nothing costs anything. On (``KAVA_SHAPE_CHECK=1``, ``kava --check-shapes``),
jaxtyping's import hook decorates the tensor half and every installed plugin before they are imported.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import entry_points
from typing import Any

VARIABLE = "KAVA_SHAPE_CHECK"
TENSOR_HALF = (
    *("kava_core.build", "kava_core.data", "kava_core.distill", "kava_core.jobs", "kava_core.kv"),
    *("kava_core.latent", "kava_core.models", "kava_core.protocols", "kava_core.train"),
    "kava_plugins",
)
CHECKER = "kava_core.shapecheck.checker"

_hooked = False


def checker(function: Any) -> Any:
    """Return a function with jaxtyping's run-time type checker: beartype, on containers' first levels."""
    from beartype import BeartypeConf, beartype

    return beartype(conf=BeartypeConf(is_color=False))(function)


def wanted() -> bool:
    """Return whether the environment asks for shape checking."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def active() -> bool:
    """Return whether shapes are checked in this process."""
    return _hooked


def modules() -> list[str]:
    """Return the tensor half and the packages of all installed plugins, by metadata: nothing is imported."""
    plugins = {point.module.partition(".")[0] for point in entry_points(group="kava")}
    return [*TENSOR_HALF, *sorted(plugins - {"kava_plugins"})]


def enable() -> None:
    """Install the import hook. Call it before the tensor half or any plugin is imported."""
    names = modules()
    late = sorted(name for name in names if name in sys.modules and name != "kava_plugins")
    if late:
        warnings.warn(
            f"imported before shape checking was switched on, not checked: {', '.join(late)}", stacklevel=2
        )
    from jaxtyping import install_import_hook

    install_import_hook(names, CHECKER)
    global _hooked
    _hooked = True
