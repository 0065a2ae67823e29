"""Test layer mappers: ``t_layer → layer``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from kava_core.protocols.layer_mapper import Measured
from kava_core.testing.component import MetaTests, saved_state
from kava_core.testing.geometries import Sides
from kava_core.testing.require import require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import draw_normal

SEEN, LONG, CHANNELS = 4, 8, 6
"""Examples, positions and width of what a measured mapper is shown."""


class LayerMapperTests(MetaTests):
    """The contract of ``protocols.layer_mapper.LayerMapper``, and of ``Measured`` if it is offered."""

    kind: ClassVar[str] = "layer_mapper"

    skips_layers: ClassVar[bool] = False
    """Whether some student layers read no teacher layer (then specs must leave them out of their losses)."""

    def inputs(self, config: Any, sides: Sides) -> tuple[()]:
        """Return no inputs: a mapper takes none."""
        return ()

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return the matrix."""
        return [component()]

    def measure(self, component: Any, sides: Sides, *, padding: float = 0.0) -> None:
        """Show two batches in which every student layer is like a teacher layer; finish."""
        teacher, student = sides
        valid = torch.arange(LONG) >= torch.arange(SEEN)[:, None] % 3
        for seed in (1, 2):
            teacher_layers = draw_normal(SEEN, teacher.layer, LONG, CHANNELS, seed=seed)
            resembled = teacher_layers[:, torch.arange(student.layer) % teacher.layer]
            noise = draw_normal(SEEN, student.layer, LONG, CHANNELS, seed=seed + 10)
            student_layers = resembled + 0.3 * noise
            where = valid[:, None, :, None]
            component.observe(
                torch.where(where, teacher_layers, padding),
                torch.where(where, student_layers, padding),
                valid,
            )
        component.finish()

    def test_axes(self, config: Any, sides: Sides) -> None:
        """Check for a floating-point matrix: rows are student layers, columns teacher layers."""
        matrix = self._checked_matrix(self.build(config, sides), sides)
        require(matrix.is_floating_point(), "a layer mapper must return floats", f"got {matrix.dtype}")

    def test_rows_are_means(self, config: Any, sides: Sides) -> None:
        """Check that weights are at least 0 and sum to 1 in every row."""
        self._require_means(self.build(config, sides), sides)

    def test_constant_without_parameters(self, config: Any) -> None:
        """Check that zeros stay where they are, because the layers to capture are chosen only once."""
        component, again = self.build(config, self.usual), self.build(config, self.usual, seed=1)
        if any(parameter.requires_grad for parameter in component.parameters()):
            return
        matrices = [component.train()(), component.eval()(), again()]
        same = all(torch.equal(matrices[0] == 0, other == 0) for other in matrices[1:])
        contract = "without trainable parameters the matrix must have its zeros at the same places every time"
        require(same, contract, "two matrices have them at different places")

    def test_gradient_reaches_the_parameters(self, config: Any) -> None:
        """Check that a mapper with trainable parameters learns."""
        component = self.build(config, self.usual)
        trained = [parameter for parameter in component.parameters() if parameter.requires_grad]
        if not trained:
            return
        matrix = component()
        require(matrix.requires_grad, "the matrix must stay attached to the parameters", "it is detached")
        (matrix * draw_normal(*matrix.shape)).sum().backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        require(
            len(gradients) == len(trained), "every parameter must get a gradient", f"{len(gradients)} did"
        )
        for gradient in gradients:
            require_finite(gradient, "the gradients of a layer mapper must be finite")

    def test_measured_rows_are_means(self, config: Any, sides: Sides) -> None:
        """Check that the measured matrix is valid as well, whatever padding holds."""
        component = self.build(config, sides)
        if isinstance(component, Measured):
            self.measure(component, sides, padding=torch.nan)
            self._require_means(component, sides)

    def test_padding_is_not_measured(self, config: Any) -> None:
        """Check that positions that are not valid have no influence."""
        component, padded = self.build(config, self.usual), self.build(config, self.usual)
        if isinstance(component, Measured):
            self.measure(component, self.usual)
            self.measure(padded, self.usual, padding=1e4)
            seen, wanted = (
                self._checked_matrix(padded, self.usual),
                self._checked_matrix(component, self.usual),
            )
            require_same(seen, wanted, "positions that are not valid must not be measured")

    def test_measured_map_can_be_named(self, config: Any, tmp_path: Path) -> None:
        """Check that ``map`` can name a file with the state of a mapper that has measured."""
        component = self.build(config, self.usual)
        if not isinstance(component, Measured):
            return
        contract = "a measured layer mapper's config needs a field map: str | None = None"
        require("map" in type(config).model_fields, contract, "it has none")
        self.measure(component, self.usual)
        file = _write_map(component, tmp_path / "map.safetensors")
        named = self.build(config.model_copy(update={"map": str(file)}), self.usual)
        seen, wanted = self._checked_matrix(named, self.usual), self._checked_matrix(component, self.usual)
        require_same(seen, wanted, "a mapper built with 'map' must give the matrix that was measured")

    def _checked_matrix(self, component: Any, sides: Sides) -> Tensor:
        shape = (sides.student.layer, sides.teacher.layer)
        return require_tensor(component(), shape, "layer t_layer", self.who)

    def _require_means(self, component: Any, sides: Sides) -> None:
        matrix = self._checked_matrix(component, sides).detach()
        require_finite(matrix, "weights must be finite")
        least = float(matrix.min())
        require(least >= 0, "weights of teacher layers must be at least 0", f"one is {least:.3g}")
        sums = matrix.double().sum(1)
        allowed = (sums - 1).abs() < 1e-4
        if self.skips_layers:
            allowed |= matrix.eq(0).all(1)
        seen = f"the sums are {[round(value, 4) for value in sums.tolist()]}"
        require(bool(allowed.all()), "every student layer's weights must sum to 1", seen)


def _write_map(component: Any, file: Path) -> Path:
    """Write the state to a file, and beside it the record of what was measured, as kava does."""
    raw = save(saved_state(component))
    file.write_bytes(raw)
    record = {"sha256": hashlib.sha256(raw).hexdigest(), "on": component.on}
    file.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    return file
