"""Built-in fusers: how much each teacher counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from kava_core import hookimpl
from kava_core.config import ComponentConfig


class Fixed(ComponentConfig):
    """Constant weights, the same everywhere."""

    name: Literal["fixed"] = "fixed"
    component = "kava_plugins.fusers.fixed:Fixed"

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Teacher's name to weight, one for every teacher; none: all teachers count alike."""

    @field_validator("weights")
    @classmethod
    def _not_all_zero(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not any(weights.values()):
            raise ValueError("at least one weight must be above 0")
        return weights


@hookimpl
def kava_fusers() -> Sequence[type[ComponentConfig]]:
    """Register this package's fusers."""
    return [Fixed]
