"""Test KV losses: the student's cache against a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kava_core.kv.align.per_layer import component_at_layer
from kava_core.protocols.axes import Cache
from kava_core.protocols.kv_loss import ObservesCaches
from kava_core.testing.component import MetaTests
from kava_core.testing.geometries import EXTENTS, GEOMETRIES, Sides
from kava_core.testing.require import gradient_of, require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import draw_cache, draw_normal

BATCH, TIME = 3, 5
OBSERVED_TIME = 40


class Compared(NamedTuple):
    """The arguments of a loss."""

    student: Cache
    target: Cache
    weight: Tensor


class KVLossTests(MetaTests):
    """The contract of ``protocols.kv_loss.KVLoss``, and of ``ObservesCaches`` if it is offered."""

    kind: ClassVar[str] = "kv_loss"

    geometries: ClassVar[Mapping[str, Sides]] = {k: v for k, v in GEOMETRIES.items() if k != "no_queries"}

    def fitted(self, config: Any, sides: Sides) -> Sides:
        """Give the target the student's extents; with ``basis_free`` only its layers."""
        teacher, student = sides
        return Sides(teacher.with_(layer=student.layer) if config.basis_free else student, student)

    def compared(
        self, config: Any, sides: Sides, *, batch: int = BATCH, time: int = TIME, dtype: Any = torch.float32
    ) -> Compared:
        """Draw random caches; weights are 0 at the first position of every example but the first."""
        teacher, student = self.fitted(config, sides)
        weight = draw_normal(batch, student.layer, time, seed=7).abs() + 0.1
        weight[1:, :, :1] = 0
        return Compared(
            draw_cache(student, config.parts, seed=1, batch=batch, time=time, dtype=dtype),
            draw_cache(teacher, config.parts, seed=2, batch=batch, time=time, dtype=dtype),
            weight,
        )

    def prepare(self, component: Any, config: Any, sides: Sides) -> None:
        """Show enough positions to a loss that needs to see data."""
        self._show_caches(component, self.compared(config, sides, time=OBSERVED_TIME))

    def _show_caches(self, component: Any, compared: Compared) -> None:
        if isinstance(component, ObservesCaches):
            student, target, weight = compared
            component.observe(student, target, (weight != 0).all(1))
            component.finish()

    def inputs(self, config: Any, sides: Sides) -> Compared:
        """Return one batch."""
        return self.compared(config, sides)

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return the loss."""
        return [component(*inputs)]

    def test_axes(self, config: Any, sides: Sides) -> None:
        """Check that the loss is a finite scalar, also for one position and for none."""
        component = self.build(config, sides)
        for batch, time in EXTENTS:
            loss = component(*self.compared(config, sides, batch=batch, time=time))
            require_finite(require_tensor(loss, (), "a scalar", self.who), "the loss must be finite")

    def test_sums_are_at_least_float32(self, config: Any, dtype: torch.dtype) -> None:
        """Check that bfloat16 caches are compared in float32, float64 caches in float64."""
        component, compared = self.build(config, self.usual), self.compared(config, self.usual, dtype=dtype)
        loss = component(*compared)
        wanted = torch.promote_types(dtype, torch.float32)
        require(loss.dtype == wanted, f"the loss of {dtype} caches must be {wanted}", f"it is {loss.dtype}")
        student, target, weight = compared
        exact = component(_change_parts(student, Tensor.double), _change_parts(target, Tensor.double), weight)
        require_same(loss.float(), exact.float(), "sums must be taken in float32 or better")

    def test_gradient_reaches_the_student(self, config: Any, sides: Sides) -> None:
        """Check that every compared part gets a finite gradient that is not 0."""
        _, target, weight = compared = self.compared(config, sides)
        student = _change_parts(compared.student, Tensor.requires_grad_)
        self._require_gradient(self.build(config, sides), Compared(student, target, weight))
        for part, x in student.items():
            single = x.shape[4] == 1  # one number has no direction to learn
            reached = bool((gradient_of(x, part) != 0).any())
            require(reached or single, "a gradient must reach the student", f"that of its {part} is 0")

    def test_gradient_is_finite_everywhere(self, config: Any) -> None:
        """Check gradients for zeros, for values of ±50, and for a student equal to its target."""
        component, (student, target, weight) = self.build(config, self.usual), self.inputs(config, self.usual)
        for change in (torch.zeros_like, lambda x: 50 * x.sign()):
            attached = _change_parts(_change_parts(student, change), Tensor.requires_grad_)
            self._require_gradient(component, Compared(attached, _change_parts(target, change), weight))
        component, perfect = self._perfect_student(config)
        self._require_gradient(component, perfect)

    def test_weight_0_has_no_influence(self, config: Any) -> None:
        """Check that such a position changes no loss and gets no gradient, whatever it holds, NaN too."""
        component, compared = self.build(config, self.usual), self.compared(config, self.usual)
        is_dead = (compared.weight == 0)[:, :, None, :, None]
        wanted = component(*compared)
        for value in (1e4, torch.nan, torch.inf):
            student = _fill_where(compared.student, is_dead, value)
            target = _fill_where(compared.target, is_dead, value)
            attached = Compared(_change_parts(student, Tensor.requires_grad_), target, compared.weight)
            contract = f"a position of weight 0 must have no influence (it held {value})"
            require_same(self._require_gradient(component, attached), wanted, contract)
            for part, x in attached.student.items():
                leaked = bool((torch.where(is_dead, gradient_of(x, part), 0) != 0).any())
                require(not leaked, "a position of weight 0 must get no gradient", f"its {part} get one")

    def test_all_weights_0(self, config: Any) -> None:
        """Check that a batch without targets has loss 0."""
        component, compared = self.build(config, self.usual), self.compared(config, self.usual)
        student = _change_parts(compared.student, Tensor.requires_grad_)
        weight = torch.zeros_like(compared.weight)
        loss = self._require_gradient(component, Compared(student, compared.target, weight))
        require(float(loss) == 0, "where all weights are 0 the loss must be 0", f"it is {float(loss):.3g}")

    def test_loss_is_proportional_to_the_weight(self, config: Any) -> None:
        """Check that twice the weight gives twice the loss."""
        component, (student, target, weight) = self.build(config, self.usual), self.inputs(config, self.usual)
        twice = component(student, target, 2 * weight)
        once = component(student, target, weight)
        require_same(twice, 2 * once, "the loss must be proportional to the weight")

    def test_gradient_reaches_the_weight(self, config: Any) -> None:
        """Check that the derivative by a position's weight is its loss, by which routers learn."""
        component, (student, target, weight) = self.build(config, self.usual), self.inputs(config, self.usual)
        weight = weight.requires_grad_()
        loss = component(student, target, weight)
        contract = "a gradient must reach the weights, by which fusers learn"
        require(loss.requires_grad, contract, "the loss is detached from them")
        (gradient,) = torch.autograd.grad(loss, weight, allow_unused=True)
        require(gradient is not None, contract, "the loss is detached from them")
        contract = "the loss must be the sum of weight × its derivative by the weight"
        require_same((gradient * weight).sum().detach(), loss.detach(), contract)

    def test_examples_are_independent(self, config: Any) -> None:
        """Check that the loss of a batch is the sum of the losses of its examples."""
        component, compared = self.build(config, self.usual), self.inputs(config, self.usual)
        rows = [_cut_example(compared, row) for row in range(BATCH)]
        apart = torch.stack([component(*row) for row in rows]).sum()
        contract = "the loss of a batch must be the sum over its examples, each taken alone"
        require_same(component(*compared), apart, contract)

    def test_layers_are_independent(self, config: Any) -> None:
        """Check that the loss of a batch is the sum of the losses of its layers."""
        component, compared = self.build(config, self.usual), self.inputs(config, self.usual)
        losses = []
        for row in range(compared.weight.shape[1]):
            at_layer = component_at_layer(component, row)
            losses.append(at_layer(*_cut_layer(compared, row)))
        apart = torch.stack(losses).sum()
        contract = "the loss of a batch must be the sum over its layers, each taken alone"
        require_same(component(*compared), apart, contract)

    def test_padding_has_no_influence(self, config: Any) -> None:
        """Check that more positions of weight 0 change nothing, on either side."""
        component, compared = self.build(config, self.usual), self.inputs(config, self.usual)
        wanted = component(*compared)
        for padding in ((0, 3), (3, 0)):
            seen = component(*_pad_batch(compared, padding))
            require_same(seen, wanted, "padding of weight 0 must not change the loss")

    def test_a_perfect_student_loses_nothing(self, config: Any) -> None:
        """Check that the loss is 0 if the student is its target, and more if it is not."""
        component, perfect = self._perfect_student(config)
        none = float(component(*perfect).detach())
        require(abs(none) < 1e-4, "a student equal to its target must have loss 0", f"it has {none:.3g}")
        some = float(self.build(config, self.usual)(*self.inputs(config, self.usual)).detach())
        require(some > 1e-3, "a student unlike its target must have a loss above 0", f"it has {some:.3g}")

    def _perfect_student(self, config: Any) -> tuple[Any, Compared]:
        """Return a component for equal extents, and a student that is its target."""
        sides = Sides(self.usual.student, self.usual.student)
        student, _, weight = self.inputs(config, sides)
        attached = _change_parts(student, lambda x: x.clone().requires_grad_())
        component = self.build(config, sides)
        seen = self.compared(config, sides, time=OBSERVED_TIME)
        self._show_caches(component, Compared(seen.student, seen.student, seen.weight))
        return component, Compared(attached, student, weight)

    def _require_gradient(self, component: Any, compared: Compared) -> Tensor:
        """Return the detached loss, once every compared part got a finite gradient from it."""
        loss: Tensor = component(*compared)
        require(loss.requires_grad, "the loss must stay attached to the student", "it is detached")
        loss.backward()
        for part, x in compared.student.items():
            gradient_of(x, f"student's {part}")
        return loss.detach()


def _change_parts(cache: Cache, change: Any) -> Cache:
    return cache.map(lambda x, _: change(x))


def _fill_where(cache: Cache, where: Tensor, value: float) -> Cache:
    return _change_parts(cache, lambda x: torch.where(where, value, x))


def _cut_example(compared: Compared, row: int) -> Compared:
    rows = slice(row, row + 1)
    return Compared(
        student=_change_parts(compared.student, lambda x: x[rows]),
        target=_change_parts(compared.target, lambda x: x[rows]),
        weight=compared.weight[rows],
    )


def _cut_layer(compared: Compared, row: int) -> Compared:
    rows = slice(row, row + 1)
    return Compared(
        student=_change_parts(compared.student, lambda x: x[:, rows]),
        target=_change_parts(compared.target, lambda x: x[:, rows]),
        weight=compared.weight[:, rows],
    )


def _pad_batch(compared: Compared, padding: tuple[int, int]) -> Compared:
    """Add positions of weight 0 before and after the others."""
    return Compared(
        student=_change_parts(compared.student, lambda x: F.pad(x, (0, 0, *padding), value=3.0)),
        target=_change_parts(compared.target, lambda x: F.pad(x, (0, 0, *padding), value=3.0)),
        weight=F.pad(compared.weight, padding),
    )
