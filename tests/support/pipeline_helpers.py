"""Small timelines, caches and specs for tests of stages and pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kava_core.config import ComponentConfig, KVLossConfig, Part
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.timeline import ANSWER, NOWHERE, PROMPT, REASONING, Timeline
from kava_core.specfile.sections.align import AlignSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from tests.support import tiny

STUDENT = Geometry(layer=2, head=2, dim=4, qhead=4, hidden=16)
WIDE = Geometry(layer=4, head=4, dim=4, qhead=8, hidden=32)
DEEP = Geometry(layer=3, head=2, dim=4, qhead=2, hidden=8)


class FakeConfig(ComponentConfig):
    """A declaration whose implementation is given as a function of the runtime arguments."""

    name: str = "fake"
    make: Any = None

    def build(self, **runtime: Any) -> Any:
        """``make(**runtime)``."""
        return self.make(**runtime)


class FakeLoss(KVLossConfig):
    """The same for a loss."""

    name: str = "fake"
    make: Any = None

    def build(self, **runtime: Any) -> Any:
        """``make(**runtime)``."""
        return self.make(**runtime)


class Module(torch.nn.Module):
    """A component that does what a function says."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        """Whatever the function returns."""
        return self.function(*arguments)


def timeline(*sizes: tuple[int, int, int], left: int = 0, right: int = 0) -> Timeline:
    """One row per (prompt, reasoning, answer); padded to the longest, plus ``left`` and ``right``."""
    longest = max(map(sum, sizes))
    rows = []
    for size in sizes:
        ids = [i for i, n in zip((PROMPT, REASONING, ANSWER), size, strict=True) for _ in range(n)]
        rows.append([NOWHERE] * left + ids + [NOWHERE] * (longest - len(ids) + right))
    segments = torch.tensor(rows)
    mask = segments != NOWHERE
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0) * mask
    spans = torch.stack([positions, positions + mask.long()], -1)
    return Timeline(mask, positions, segments, spans)


def cache(
    geometry: Geometry, time: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Cache:
    """Random keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(part: Part) -> Tensor:
        shape = (batch, geometry.layer, geometry.heads(part), time, geometry.dim)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Cache(draw("keys"), draw("values"))


def spec(*aligns: dict[str, Any], losses: list[Any], **fields: Any) -> PipelineSpec:
    """A spec with one teacher for each ``align``, called a, b, …; width passes unless said otherwise."""
    plain = {"dim_projector": "identity", "sinks": "compare"}
    teachers = [
        {"name": "abcdef"[i], "config": tiny.llama(), "tokenizer": tiny.CHARS, "align": plain | align}
        for i, align in enumerate(aligns)
    ]
    return tiny.spec(teachers=teachers, losses=losses, **({"target": "fused"} | fields))


def fake_align(**replaced: Any) -> AlignSpec:
    """An align section of built-ins, some components replaced."""
    plain = spec({}, losses=["mse"]).teachers[0].align
    return AlignSpec.model_construct(**(dict(plain) | replaced))
