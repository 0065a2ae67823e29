"""Built-in layer mappers: ``t_layer → layer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class Ratio(ComponentConfig):
    """Depth-proportional: student layer i of L reads teacher layer round((i + 1) · T / L) − 1 of T."""

    name: Literal["ratio"] = "ratio"
    component = "kava_plugins.layer_mappers.ratio:Ratio"

    sources: int = Field(1, gt=0)
    """How many neighbouring teacher layers each student layer averages."""


@hookimpl
def kava_layer_mappers() -> Sequence[type[ComponentConfig]]:
    """Register this package's layer mappers."""
    return [Ratio]
