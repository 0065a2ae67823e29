"""Every registered component goes through the conformance kit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from kava_core import testing
from kava_core.config import ComponentConfig
from kava_core.hookspecs import KINDS
from kava_core.registry import Registry
from kava_core.testing import ComponentTests, KVLossTests, Sides
from kava_core.testing.geometries import GEOMETRIES

REGISTRY = Registry.build({"*"})
COMPONENTS = {(one.kind, one.name): one.config for one in REGISTRY.table()}


@dataclass(frozen=True)
class Run:
    """One run of the kit: the config's fields, and what of the kit is other than usual."""

    fields: dict[str, Any] = field(default_factory=dict)
    kit: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The fields, as part of a class name."""
        return re.sub(r"\W+", "_", "".join(f"_{name}_{value}" for name, value in self.fields.items()))


FEW = {name: GEOMETRIES[name] for name in ("usual", "odd", "to_one_head", "fewer_teacher_layers")}
"""For the second run of a component and those after it."""
KEYS_AND_VALUES = {"parts": ("keys", "values")}
EQUAL_LENGTHS = {
    "lengths": ((6, 6), (1, 1), (0, 0)),
    "paddings": (("right", "right"), ("left", "left")),
}
WIDER_THAN_ONE = {"geometries": {k: v for k, v in GEOMETRIES.items() if v.teacher.dim > 1}}
"""The LayerNorm of a single number is 0: no gradient comes through."""
WHOLE_BATCH = {"test_examples_are_independent": None}
QUERIES = {"parts": ("keys", "values", "queries")}
EQUAL_QUERY_HEADS = {
    "geometries": {
        name: Sides(teacher.with_(qhead=student.qhead, head=1), student)
        for name, (teacher, student) in KVLossTests.geometries.items()
    }
}

RUNS: dict[tuple[str, str], list[Run]] = {
    ("head_adapter", "structured"): [
        Run(),
        Run({"init": "random", "trainable": True, "per_layer": True, "share_kv": False}),
        Run({"init": "uniform"}),
    ],
    ("head_adapter", "flat"): [Run(kit=KEYS_AND_VALUES), Run({"layers": True}, KEYS_AND_VALUES)],
    ("time_warper", "identity"): [Run(kit=EQUAL_LENGTHS)],
    ("time_warper", "linear"): [Run({"mode": m}) for m in ("auto", "interpolate", "area", "nearest")],
    ("time_warper", "segment"): [
        *(Run({"mode": m}) for m in ("auto", "interpolate", "area", "nearest")),
        Run({"segments": ("reasoning",), "ratio": {"reasoning": 0.5}, "smoothing": {"reasoning": 3}}),
    ],
    ("time_warper", "char_iou"): [Run({"mode": "soft"}), Run({"mode": "hard", "min_overlap": 0.3})],
    ("time_warper", "streaming"): [Run(), Run({"sinks": 1, "window": 2}), Run({"sinks": 0, "window": 1})],
    ("layer_mapper", "ratio"): [Run(), Run({"sources": 3})],
    ("layer_mapper", "chosen"): [Run({"layers": [[0]]}), Run({"layers": [[0, -1]]})],
    ("layer_mapper", "last_aligned"): [Run(), Run({"sources": 3})],
    ("layer_mapper", "cka"): [Run(), Run({"on": "keys", "top_k": 1, "rows": 8})],
    ("dim_projector", "linear"): [
        Run(),
        Run({"share_heads": False, "init": "random", "trainable": False}),
        Run({"share_kv": True}),
    ],
    ("dim_projector", "elastic"): [
        Run(kit=WIDER_THAN_ONE),
        Run({"share_heads": False, "mlp_ratio": 2.0, "share_kv": True}, WIDER_THAN_ONE),
    ],
    ("dim_projector", "calibrated"): [
        Run(),
        Run({"per_head": False, "trainable": True}),
        Run({"method": "procrustes"}),
        Run({"method": "ridge", "per_head": False}),
    ],
    ("fuser", "fixed"): [Run(), Run({"weights": {"ada": 1, "bob": 0, "cleo": 2.5}}, {"counts": (3,)})],
    ("fuser", "similarity"): [Run(), Run({"per": "example"})],
    ("fuser", "learnable"): [Run({"entropy": 0.1}), Run({"per": "example", "per_layer": True})],
    ("fuser", "attention"): [Run({"balance": 0.1})],
    ("fuser", "task"): [
        Run({"weights": {"math": {"ada": 1, "bob": 0, "cleo": 2}}}, {"counts": (3,)}),
    ],
    ("kv_loss", "mse"): [
        Run(),
        Run(QUERIES),
        Run({"scale": "example"}),
        Run({"scale": "batch"}, WHOLE_BATCH),
    ],
    ("kv_loss", "smooth_l1"): [
        Run({"beta": 0.5}),
        Run({"scale": "example"}),
        Run({"scale": "batch"}, WHOLE_BATCH),
    ],
    ("kv_loss", "mercator"): [Run(), Run(QUERIES)],
    ("kv_loss", "relation"): [
        Run(),
        Run({"parts": ("keys", "values"), "center": False}),
        Run({"form": "softmax", "heads": 2}, {"refuses": ("odd",)}),
    ],
    ("kv_loss", "shared_space"): [
        Run(),
        Run({"parts": ("keys", "values"), "dim": 3}),
        Run({"trainable": True, "dim": 5}),
    ],
    ("kv_loss", "attention_kl"): [
        Run(kit=EQUAL_QUERY_HEADS),
        Run({"causal": False, "kind": "jeffreys", "temperature": 2.0}, EQUAL_QUERY_HEADS),
        Run({"kind": "reverse"}, EQUAL_QUERY_HEADS),
    ],
    ("kv_loss", "attention_output"): [Run(), Run({"form": "mse", "causal": False})],
    ("kv_loss", "structural"): [Run(), Run({"alpha_attn": 0}), Run({"attention_layers": (-1,)})],
}
"""Components that are run with other fields than their defaults, or not with the whole kit."""


def kit_of(kind: str) -> type[ComponentTests]:
    """``layer_mapper`` → ``LayerMapperTests``."""
    words = ["KV" if word == "kv" else word.capitalize() for word in kind.split("_")]
    kit: type[ComponentTests] = getattr(testing, "".join(words) + "Tests")
    return kit


def made(
    kind: str, declaration: type[ComponentConfig], overrides: dict[str, Any], run: Run
) -> type[ComponentTests]:
    """A subclass of the kit, as a plugin's author writes it."""

    @pytest.fixture
    def config(self: ComponentTests) -> ComponentConfig:
        return declaration(**run.fields)

    title = f"Test_{kind}_{declaration.component_name()}{run.title}"
    return type(title, (kit_of(kind),), {"config": config, **overrides})


for (kind, name), declaration in COMPONENTS.items():
    for order, run in enumerate(RUNS.get((kind, name), [Run()])):
        suite = made(kind, declaration, {"geometries": FEW, **run.kit} if order else run.kit, run)
        globals()[suite.__name__] = suite


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_kit_of_its_name(kind: str) -> None:
    assert kit_of(kind).kind == kind
    assert kit_of(kind).__name__ in testing.__all__


@pytest.mark.parametrize("component", sorted(COMPONENTS), ids="-".join)
def test_every_component_has_a_run(component: tuple[str, str]) -> None:
    prefix = "Test_{}_{}".format(*component)
    runs = [suite for title, suite in globals().items() if title.startswith(prefix)]
    assert runs
    assert all(issubclass(suite, kit_of(component[0])) for suite in runs)


def test_the_table_names_components_that_exist() -> None:
    assert REGISTRY.failures == ()
    assert set(RUNS) <= set(COMPONENTS)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_query_heads_are_groups(name: str) -> None:
    for geometry in GEOMETRIES[name]:
        assert geometry.qhead % geometry.head == 0
