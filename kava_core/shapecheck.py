"""Check shapes and types of tensors in debug mode, third-party plugins included.

Off, nothing is hooked and nothing costs anything. On (``KAVA_SHAPE_CHECK=1``, ``kava --check-shapes``),
jaxtyping's import hook decorates the tensor half and every installed plugin before they are imported.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from types import ModuleType
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

    finder = install_import_hook(names, CHECKER).hook
    sys.meta_path[sys.meta_path.index(finder)] = _QuickFinder(finder)
    global _hooked
    _hooked = True


class _QuickFinder(MetaPathFinder):
    """Finds modules as jaxtyping's hook does, whose loader makes what they import slow to import.

    While it executes a module, jaxtyping's loader makes Python look for byte code under another name. So all
    of torch and transformers would be compiled again, at every start where Python keeps no byte code. The
    price: checked modules, which are few, are compiled at each start.

    Args:
        finder: jaxtyping's.
    """

    def __init__(self, finder: MetaPathFinder) -> None:
        self.finder = finder

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module is, with a loader that instruments it; None: it is not to be checked."""
        spec = self.finder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader.exec_module = partial(_execute, spec.loader)  # type: ignore[method-assign]
        return spec


def _execute(loader: SourceFileLoader, module: ModuleType) -> None:
    """Instrument and execute a module from its source."""
    exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)
