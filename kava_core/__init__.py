"""Distil the key-value caches of teachers into a student.

Importing this package imports no torch. What a training loop of your own needs is here as well, and is
imported when it is first asked for::

    import kava_core as kava

    spec = kava.load_spec("mine.yaml").spec
    pipeline = kava.build_pipeline(spec, teachers={"big": kava.model_geometry(big)}, student=…)

``examples/own_loop.py`` is a whole loop.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pluggy

from kava_core import shapecheck
from kava_core.moved import find_moved_modules

if TYPE_CHECKING:
    from kava_core.build.data import make_data
    from kava_core.build.pipeline import build_pipeline
    from kava_core.build.teachers import load_teachers
    from kava_core.costs.plan import make_plan
    from kava_core.data.collate import Collator
    from kava_core.data.examples import Example
    from kava_core.distill.distiller import Distiller
    from kava_core.kv.capture.capture import Capture
    from kava_core.kv.capture.geometry import model_geometry
    from kava_core.kv.compare.pipeline import KVPipeline
    from kava_core.models.student import load_student
    from kava_core.models.teacher import Teacher
    from kava_core.protocols.axes import Cache, Geometry
    from kava_core.protocols.timeline import Timeline
    from kava_core.specfile.load import load_spec

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("kava")
"""Marks a plugin's hook functions: ``from kava_core import hookimpl``."""

FRONT_DOOR = {
    "load_spec": "kava_core.specfile.load",
    "make_plan": "kava_core.costs.plan",
    "make_data": "kava_core.build.data",
    "load_student": "kava_core.models.student",
    "load_teachers": "kava_core.build.teachers",
    "build_pipeline": "kava_core.build.pipeline",
    "KVPipeline": "kava_core.kv.compare.pipeline",
    "Capture": "kava_core.kv.capture.capture",
    "model_geometry": "kava_core.kv.capture.geometry",
    "Geometry": "kava_core.protocols.axes",
    "Cache": "kava_core.protocols.axes",
    "Timeline": "kava_core.protocols.timeline",
    "Example": "kava_core.data.examples",
    "Collator": "kava_core.data.collate",
    "Teacher": "kava_core.models.teacher",
    "Distiller": "kava_core.distill.distiller",
}
"""Every name that is imported when it is first asked for, and the module it is in."""

find_moved_modules()

if shapecheck.wanted():
    shapecheck.enable()


def __getattr__(name: str) -> Any:
    if name not in FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(FRONT_DOOR[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *FRONT_DOOR})


__all__ = [
    "Cache",
    "Capture",
    "Collator",
    "Distiller",
    "Example",
    "Geometry",
    "KVPipeline",
    "Teacher",
    "Timeline",
    "__version__",
    "build_pipeline",
    "hookimpl",
    "load_spec",
    "load_student",
    "load_teachers",
    "make_data",
    "make_plan",
    "model_geometry",
]
