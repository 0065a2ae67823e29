"""Every hook is documented by an example that runs; every name derives from the kind."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core import hookspecs, protocols
from kava_core.hookspecs import KINDS
from kava_core.kv.align import boundaries as stages
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.timeline import REASONING, Timeline
from kava_core.registry import BUILT_IN, Registry
from tests.support.hook_examples import files_of, install
from tests.support.source import ROOT

TEACHER = Geometry(layer=4, head=4, dim=8, qhead=8, hidden=64)
STUDENT = Geometry(layer=3, head=2, dim=4, qhead=4, hidden=16)
SIDES = {"teacher": TEACHER, "student": STUDENT}


def timeline(time: int) -> Timeline:
    positions = torch.arange(time).expand(2, time)
    spans = torch.stack([positions, positions + 1], -1)
    return Timeline(torch.ones(2, time, dtype=torch.bool), positions, torch.full((2, time), REASONING), spans)


def random(*extents: int) -> Tensor:
    return torch.randn(2, *extents, generator=torch.Generator().manual_seed(0))


def use_head_adapter(config: Any) -> None:
    adapter, x = config.build(**SIDES), random(3, 4, 5, 8)
    assert torch.equal(stages.adapt_heads(adapter, x, "keys", layer=x.shape[1], head=2, dim=8), x[:, :, :2])
    assert torch.equal(stages.fold_heads(adapter, x, layer=x.shape[1], head=4, dim=8), x)


def use_time_warper(config: Any) -> None:
    x = random(3, 2, 6, 4)
    time_map = stages.plan_time(config.build(**SIDES), timeline(6), timeline(4))
    assert torch.equal(stages.warp_time(time_map, x, time=4), x[:, :, :, 1:5])


def use_layer_mapper(config: Any) -> None:
    assert torch.equal(stages.layer_matrix(config.build(**SIDES), **SIDES), torch.eye(4)[:3])


def use_dim_projector(config: Any) -> None:
    x = random(3, 2, 5, 8)
    assert torch.equal(stages.project_dim(config.build(**SIDES), x, "values", dim=4), x[..., :4])


def use_fuser(config: Any) -> None:
    fuser = config.build(teachers=("a", "b"), student=STUDENT)
    valid = torch.tensor([[[True, True, False]] * 2, [[True] * 3] * 2])
    cache = Cache(keys=random(3, 2, 3, 4))
    weights = stages.teacher_weights(
        fuser, protocols.FusionContext(valid, (cache, cache), cache), valid, layer=3
    )
    assert weights[:, 0, 0].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def use_kv_loss(config: Any) -> None:
    ours, target, weight = random(3, 2, 5, 4), random(3, 2, 5, 4) + 1, random(3, 5).abs()
    loss = stages.summed_loss(config.build(**SIDES), Cache(ours, ours), Cache(target, target), weight)
    by_hand = sum(
        float(
            2
            * weight[b, i, t].double()
            * (ours[b, i, :, t].double() - target[b, i, :, t].double()).abs().mean()
        )
        for b in range(2)
        for i in range(3)
        for t in range(5)
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


USES: dict[str, Callable[[Any], None]] = {kind: globals()[f"use_{kind}"] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_docstring_is_a_plugin_that_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = install(KINDS[kind], tmp_path)
    importlib.invalidate_caches()
    registry = Registry.build()
    assert registry.failures == ()
    [theirs] = [one for one in registry.table() if one.distribution == package.replace("_", "-")]
    assert theirs.kind == kind
    USES[kind](theirs.config())


@pytest.mark.parametrize("kind", KINDS)
def test_example_has_a_declaration_and_an_implementation(kind: str) -> None:
    first, second = files_of(KINDS[kind])
    assert first.endswith("/__init__.py")
    assert not second.endswith("/__init__.py")


@pytest.mark.parametrize("kind", KINDS)
def test_names_derive_from_the_kind(kind: str) -> None:
    plural = re.sub(r"s$", "se", kind) + "s"
    assert KINDS[kind] == f"kava_{plural}"
    assert callable(getattr(hookspecs, KINDS[kind]))
    assert hasattr(importlib.import_module(f"kava_plugins.{plural}"), KINDS[kind])
    words = ["KV" if word == "kv" else word.capitalize() for word in kind.split("_")]
    assert hasattr(protocols, "".join(words))


def test_every_hook_has_a_kind() -> None:
    assert {name for name in vars(hookspecs) if name.startswith("kava_")} == set(KINDS.values())


@pytest.mark.parametrize("one", Registry.build({"*"}).table(), ids=lambda one: f"{one.kind}-{one.name}")
def test_built_in_file_is_called_like_the_component(one: Any) -> None:
    assert one.distribution == BUILT_IN
    module, _, _ = one.config.component.partition(":")
    assert module == f"kava_plugins.{KINDS[one.kind].removeprefix('kava_')}.{one.name}"
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
