"""Define types that several blocks of a spec use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
"""A whole number of at least 1."""
