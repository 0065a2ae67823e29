"""Always-on checks of what components return: a few integers compared, no debug mode needed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kava_core.errors import PluginError


def expect(x: Tensor, extents: Sequence[int], axes: str) -> Tensor:
    """``x``; PluginError where its shape is not ``extents`` (words of the axes in ``axes``)."""
    if tuple(x.shape) != tuple(extents):
        wanted = ", ".join(f"{axis} {extent}" for axis, extent in zip(axes.split(), extents, strict=True))
        raise PluginError(f"returned shape {list(x.shape)}, must be {list(extents)} ({wanted})")
    return x
