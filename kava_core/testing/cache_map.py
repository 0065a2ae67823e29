"""Test what head adapters and width projectors share: both map one part of a cache to another."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.align.per_layer import component_at_layer
from kava_core.protocols.axes import PARTS
from kava_core.testing.component import MetaTests
from kava_core.testing.geometries import EXTENTS, Sides
from kava_core.testing.require import gradient_of, require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import draw_normal, draw_part

AXES = "batch layer head time dim"
BATCH, TIME = 3, 5


class CacheMapTests(MetaTests):
    """Tests of shapes, dtypes, gradients, and of what must not mix."""

    parts: ClassVar[tuple[Part, ...]] = PARTS
    """Parts that the component maps; it must refuse the others."""

    def compared(self, sides: Sides) -> list[Part]:
        """Return the parts that exist: no queries if no loss compares them."""
        return [part for part in self.parts if sides.student.heads(part)]

    def shape_of(self, component: Any, config: Any, sides: Sides, part: Part) -> tuple[int, int, int]:
        """Return the extents ``layer head dim`` of the output."""
        raise NotImplementedError

    def draw(self, config: Any, sides: Sides, part: Part, **extents: Any) -> Tensor:
        """Draw a random input of one part."""
        extents = {"batch": BATCH, "time": TIME} | extents
        return draw_part(self.fitted(config, sides).teacher, part, **extents)

    def inputs(self, config: Any, sides: Sides) -> dict[Part, Tensor]:
        """Return one random tensor for each part."""
        return {part: self.draw(config, sides, part) for part in self.compared(sides)}

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return the mapped parts."""
        return [component(x, part) for part, x in inputs.items()]

    def test_axes(self, config: Any, sides: Sides) -> None:
        """Check that only its own axis changes, for every part, also for one position and for none."""
        component = self.build(config, sides)
        for part in self.compared(sides):
            layer, head, dim = self.shape_of(component, config, sides, part)
            for batch, time in EXTENTS:
                x = self.draw(config, sides, part, batch=batch, time=time)
                shape = (batch, layer, head, time, dim)
                mapped = require_tensor(component(x, part), shape, AXES, f"{self.who} ({part})")
                require_finite(mapped, f"{self.who} must return finite numbers for finite {part}")

    def test_dtype_is_kept(self, config: Any, dtype: torch.dtype) -> None:
        """Check that bfloat16, float32 and float64 come out as they went in."""
        component = self.build(config, self.usual)
        for part in self.compared(self.usual):
            actual = component(self.draw(config, self.usual, part, dtype=dtype), part).dtype
            contract = f"{self.who} must keep the dtype of its input ({dtype})"
            require(actual == dtype, contract, f"got {actual}")

    def test_gradient_reaches_the_input(self, config: Any, sides: Sides) -> None:
        """Check that the output is attached to input and parameters, and that gradients are finite."""
        component = self.build(config, sides)
        for part in self.compared(sides):
            x = self.draw(config, sides, part).requires_grad_()
            y = component(x, part)
            require(y.requires_grad, "the output must stay attached to the input", "it is detached")
            (y * draw_normal(*y.shape, seed=1)).sum().backward()
            gradient = gradient_of(x, f"input ({part})")
            require(bool((gradient != 0).any()), "a gradient must reach the input", f"that of {part} is 0")
        for name, parameter in component.named_parameters():
            if parameter.grad is not None:
                require_finite(parameter.grad, f"the gradient of {name} must be finite")

    def test_examples_are_independent(self, config: Any) -> None:
        """Check that an example alone gives what it gives in a batch."""
        component = self.build(config, self.usual)
        for part, x in self.inputs(config, self.usual).items():
            for row in range(BATCH):
                alone = component(x[row : row + 1], part)
                wanted = component(x, part)[row : row + 1]
                require_same(alone, wanted, "an example must not depend on the others of its batch")

    def test_positions_are_independent(self, config: Any) -> None:
        """Check that NaN at a padded position stays there."""
        component = self.build(config, self.usual)
        for part, x in self.inputs(config, self.usual).items():
            padded = x.clone()
            padded[0, :, :, 2] = torch.nan
            actual, wanted = component(padded, part), component(x, part)
            actual[0, :, :, 2] = wanted[0, :, :, 2]
            require_same(
                actual, wanted, "a position must not depend on other positions, which may be padding"
            )

    def test_one_layer_alone(self, config: Any) -> None:
        """Check that a layer alone gives what it gives among all: ``train.stream`` calls them one by one."""
        component = self.build(config, self.usual)
        contract = "a layer alone must give what it gives among all; name parameters by layer in 'layered'"
        for part, x in self.inputs(config, self.usual).items():
            whole = component(x, part)
            if whole.shape[1] != x.shape[1]:  # it sees all layers as one
                continue
            for row in range(x.shape[1]):
                alone = component_at_layer(component, row)(x[:, row : row + 1], part)
                require_same(alone, whole[:, row : row + 1], contract)

    def test_linear_is_linear(self, config: Any) -> None:
        """Check that a component marked ``linear`` is affine: kava exchanges the order of such stages."""
        component = self.build(config, self.usual)
        if not getattr(component, "linear", False):
            return
        for part in self.compared(self.usual):
            x = self.draw(config, self.usual, part, seed=1, dtype=torch.float64)
            y = self.draw(config, self.usual, part, seed=2, dtype=torch.float64)
            together = component(1.7 * x - 0.7 * y, part)
            apart = 1.7 * component(x, part) - 0.7 * component(y, part)
            require_same(together, apart, "with linear = True weighted means must pass unchanged")

    def test_other_parts_are_refused(self, config: Any) -> None:
        """Check that parts that are not in ``parts`` raise a KavaError that names the component."""
        for part in PARTS:
            if part in self.parts:
                continue
            component = self.build(config, self.usual)
            with pytest.raises(KavaError, match=config.name):
                component(self.draw(config, self.usual, part), part)
