"""Test width projectors: ``t_dim → dim``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.protocols.dim_projector import Calibrated
from kava_core.testing.cache_map import CacheMapTests
from kava_core.testing.geometries import Sides
from kava_core.testing.require import require_same
from kava_core.testing.tensors import draw_part

SEEN, LONG = 4, 12
"""Examples and positions shown to a calibrated projector in one batch."""


class DimProjectorTests(CacheMapTests):
    """The contract of ``protocols.dim_projector.DimProjector``, and of ``Calibrated`` if it is offered."""

    kind: ClassVar[str] = "dim_projector"

    def fitted(self, config: Any, sides: Sides) -> Sides:
        """Align layers and heads, which come before the width."""
        teacher, student = sides
        return Sides(teacher.with_(layer=student.layer, head=student.head, qhead=student.qhead), student)

    def prepare(self, component: Any, config: Any, sides: Sides) -> None:
        """Calibrate on two batches."""
        if isinstance(component, Calibrated):
            self.calibrate(component, config, sides, batches=2)

    def calibrate(
        self, component: Any, config: Any, sides: Sides, *, batches: int, padding: float = 0.0
    ) -> None:
        """Show the same positions, cut into batches, with ``padding`` where nothing is valid; finish."""
        valid = torch.arange(LONG) >= torch.arange(2 * SEEN)[:, None] % 4
        for part in self.compared(sides):
            teacher, student = self.fitted(config, sides)
            x = _shown_cache(teacher, part, valid, padding, seed=3)
            like = _shown_cache(student, part, valid, padding, seed=4)
            pieces = zip(x.chunk(batches), like.chunk(batches), valid.chunk(batches), strict=True)
            for x_piece, like_piece, valid_piece in pieces:
                component.observe(x_piece, like_piece, valid_piece, part)
        component.finish()

    def shape_of(self, component: Any, config: Any, sides: Sides, part: Part) -> tuple[int, int, int]:
        """Return extents with the student's width, or the teacher's if the component has ``keeps_width``."""
        teacher, student = self.fitted(config, sides)
        dim = teacher.dim if getattr(component, "keeps_width", False) else student.dim
        return student.layer, student.heads(part), dim

    def test_shared_width_is_shared(self, config: Any) -> None:
        """Check that ``shared_width`` projects any heads, in any order: kava may do so before mixing them."""
        component = self.build(config, self.usual)
        if not getattr(component, "shared_width", False):
            return
        for part, x in self.inputs(config, self.usual).items():
            projected = component(x, part)
            more_heads = component(torch.cat([x, x], 2).flip(2), part)
            contract = "with shared_width = True every head must be projected alike, however many there are"
            require_same(more_heads, torch.cat([projected, projected], 2).flip(2), contract)

    def test_calibration_sees_valid_positions_only(self, config: Any) -> None:
        """Check that padding may hold anything, NaN too."""
        contract = "positions that are not valid must not enter the calibration"
        self._require_same_calibration(config, contract, {"batches": 1, "padding": torch.nan}, {"batches": 1})

    def test_calibration_sums_over_batches(self, config: Any) -> None:
        """Check that the cut of the examples into batches changes nothing."""
        contract = "the calibration must not depend on how its examples are cut into batches"
        self._require_same_calibration(config, contract, {"batches": 4}, {"batches": 1})

    def _require_same_calibration(
        self, config: Any, contract: str, one: dict[str, Any], other: dict[str, Any]
    ) -> None:
        inputs, projected = self.inputs(config, self.usual), []
        for shown in (one, other):
            component = self.construct(config, self.fitted(config, self.usual)).eval()
            if not isinstance(component, Calibrated):
                return
            self.calibrate(component, config, self.usual, **shown)
            projected.append(self.outputs(component, inputs))
        for seen, wanted in zip(*projected, strict=True):
            require_same(seen, wanted, contract)


def _shown_cache(geometry: Any, part: Part, valid: Tensor, padding: float, seed: int) -> Tensor:
    """Draw correlated channels with different scales, so that calibrated directions are well defined."""
    x = draw_part(geometry, part, batch=valid.shape[0], time=valid.shape[1], seed=seed)
    x = x * torch.linspace(2.0, 0.5, geometry.dim) + 0.5
    return torch.where(valid[:, None, None, :, None], x, padding)
