"""Test fusers: how much each teacher counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.kv.align.boundaries import teacher_weights
from kava_core.protocols.axes import Cache
from kava_core.protocols.fuser import FusionContext, ObservesTeachers, Regularised
from kava_core.testing.component import MetaTests
from kava_core.testing.geometries import Sides
from kava_core.testing.require import require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import change_tensors, draw_cache, draw_normal

BATCH, TIME = 3, 5


class FuserTests(MetaTests):
    """The contract of ``kava_core.protocols.fuser.Fuser``."""

    kind: ClassVar[str] = "fuser"

    names: ClassVar[tuple[str, ...]] = ("ada", "bob", "cleo")
    """The teachers' names."""

    counts: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """How many of them there are."""

    parts: ClassVar[tuple[Part, ...]] = ("keys", "values")
    """Parts in the caches the fuser sees."""

    def construct(self, config: Any, sides: Sides, names: tuple[str, ...] | None = None) -> Any:
        """Build the implementation with the teachers' names instead of a geometry."""
        return config.build(teachers=names or self.names, student=sides.student)

    def prepare(self, component: Any, config: Any, sides: Sides) -> None:
        """Show two batches to a fuser that needs to see some."""
        self._show_contexts(component, [self.context(sides, len(self.names), seed=seed) for seed in (1, 2)])

    def context(
        self,
        sides: Sides,
        teachers: int,
        *,
        batch: int = BATCH,
        time: int = TIME,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> FusionContext:
        """Draw random caches; the first teacher has no last position, the last teacher no first one."""
        valid = torch.ones(teachers, batch, time, dtype=torch.bool)
        valid[0, :, time - 1 :] = valid[-1, :, :1] = False

        def draw_side(seed: int) -> Cache:
            return draw_cache(sides.student, self.parts, batch=batch, time=time, seed=seed, dtype=dtype)

        return FusionContext(
            valid=valid,
            targets=tuple(draw_side(100 * seed + 1 + teacher) for teacher in range(teachers)),
            student=draw_side(100 * seed),
            hidden=draw_normal(batch, time, sides.student.hidden, seed=100 * seed, dtype=dtype),
            tasks=tuple("math" if row % 2 else "" for row in range(batch)),
        )

    def inputs(self, config: Any, sides: Sides) -> FusionContext:
        """Return the context of all teachers."""
        return self.context(sides, len(self.names))

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return the weights, and the fuser's own term of the loss if it has one."""
        weights = component(inputs)
        return [weights, component.penalty(weights)] if isinstance(component, Regularised) else [weights]

    def test_axes(self, config: Any, sides: Sides) -> None:
        """Check the shape of the weights: teacher, example, layer, position, for any number of teachers."""
        for teachers in self.counts:
            component = self.construct(config, sides, self.names[:teachers]).eval()
            self._show_contexts(component, [self.context(sides, teachers)])
            for batch, time in ((BATCH, TIME), (1, TIME), (BATCH, 1), (BATCH, 0)):
                weights = component(self.context(sides, teachers, batch=batch, time=time))
                shape = (teachers, batch, sides.student.layer, time)
                weights = require_tensor(weights, shape, "teacher batch layer time", self.who)
                floats = weights.is_floating_point()
                require(floats, "a fuser must return floats", f"it returned {weights.dtype}")

    def test_weights_are_at_least_0(self, config: Any, sides: Sides) -> None:
        """Check that weights are finite, none is negative and not all are 0."""
        weights = self._usual_weights(config, sides)
        require_finite(weights, "weights of teachers must be finite")
        least, total = float(weights.detach().min()), float(weights.detach().sum())
        require(least >= 0, "weights of teachers must be at least 0", f"one is {least:.3g}")
        require(total > 0, "some teacher must count somewhere", "all weights are 0")

    def test_any_dtype(self, config: Any, dtype: torch.dtype) -> None:
        """Check that caches may be bfloat16, float32 or float64."""
        context = self.context(self.usual, len(self.names), dtype=dtype)
        weights = self.build(config, self.usual)(context)
        require_finite(weights, f"weights of teachers must be finite ({dtype})")

    def test_masked_teachers_have_no_influence(self, config: Any) -> None:
        """Check that values where a teacher has no target change nothing, not even NaN."""
        context, component = self.inputs(config, self.usual), self.build(config, self.usual)
        wanted = self._renormalised_weights(component, context)
        targets = []
        for target, valid in zip(context.targets, context.valid, strict=True):
            targets.append(_fill_where_not_valid(target, valid, torch.nan))
        contract = "a teacher must have no influence at positions where it is not valid"
        try:
            seen = self._renormalised_weights(component, replace(context, targets=tuple(targets)))
        except NonFiniteError as error:
            require(False, contract, f"NaN there gives {error}")
        else:
            require_same(seen, wanted, contract)

    def test_targets_are_needed_or_not_looked_at(self, config: Any) -> None:
        """Check that weights need no targets with ``needs_targets = False``: teachers may not have run."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        if getattr(component, "needs_targets", True):
            return
        without = replace(context, targets=tuple(Cache() for _ in context.targets))
        contract = "with needs_targets = False the weights must not depend on the teachers' targets"
        try:
            seen = self._renormalised_weights(component, without)
        except Exception as error:
            require(False, contract, f"without them it raised {type(error).__name__}")
        else:
            require_same(seen, self._renormalised_weights(component, context), contract)

    def test_examples_are_independent(self, config: Any) -> None:
        """Check that an example alone gives what it gives in a batch."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        together = component(context)
        for row in range(BATCH):
            rows = slice(row, row + 1)
            contract = "an example must not depend on the others of its batch"
            require_same(component(_cut_examples(context, rows)), together[:, rows], contract)

    def test_order_of_teachers_does_not_matter(self, config: Any) -> None:
        """Check that teachers in another order get the same weights, unless the fuser learns one by place."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        if any(True for _ in component.parameters()):
            return
        reversed_fuser = self.construct(config, self.usual, self.names[::-1]).eval()
        contexts = [self.context(self.usual, len(self.names), seed=seed) for seed in (1, 2)]
        self._show_contexts(reversed_fuser, [_reverse_teachers(shown) for shown in contexts])
        seen = reversed_fuser(_reverse_teachers(context)).flip(0)
        require_same(seen, component(context), "a teacher's weight must not depend on its place")

    def test_gradients_are_finite(self, config: Any) -> None:
        """Check the gradients of the fuser's parameters, and of the student if the weights depend on it."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        student = change_tensors(context.student, lambda x: x.requires_grad_())
        weights = self._renormalised_weights(component, replace(context, student=student))
        if not weights.requires_grad:
            return
        (weights * torch.arange(1, weights.numel() + 1).view_as(weights)).sum().backward()
        leaves = {**dict(component.named_parameters()), **dict(student.items())}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                require_finite(leaf.grad, f"the gradient of {name} must be finite")

    def test_penalty_is_a_scalar(self, config: Any) -> None:
        """Check that the fuser's own term is a finite scalar, also if no teacher is valid."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        if not isinstance(component, Regularised):
            return
        weights = self._renormalised_weights(component, context)
        for given in (weights, torch.zeros_like(weights)):
            penalty = require_tensor(component.penalty(given), (), "a scalar", "penalty")
            require_finite(penalty, "the penalty must be finite")

    def test_penalty_of_certain_weights_has_a_gradient(self, config: Any) -> None:
        """Check weights that are all one teacher's: −w log w has an infinite slope at 0."""
        component, context = self.build(config, self.usual), self.inputs(config, self.usual)
        if not isinstance(component, Regularised):
            return
        weights = torch.zeros_like(self._renormalised_weights(component, context).detach())
        weights[0] = 1
        penalty = component.penalty(weights.requires_grad_())
        if penalty.requires_grad:
            penalty.backward()
        if weights.grad is not None:
            require_finite(weights.grad, "the gradient of the penalty must be finite where weights are 0")

    def _show_contexts(self, component: Any, contexts: list[FusionContext]) -> None:
        if isinstance(component, ObservesTeachers):
            for context in contexts:
                component.observe(context)
            component.finish()

    def _usual_weights(self, config: Any, sides: Sides) -> Tensor:
        weights: Tensor = self.build(config, sides)(self.inputs(config, sides))
        return weights

    def _renormalised_weights(self, component: Any, context: FusionContext) -> Tensor:
        return teacher_weights(component, context, context.valid, layer=context.student.any.shape[1])


def _fill_where_not_valid(cache: Cache, valid: Tensor, value: float) -> Cache:
    return cache.map(lambda x, _: torch.where(valid[:, None, None, :, None], x, value))


def _cut_examples(context: FusionContext, rows: slice) -> FusionContext:
    """Return the context of some examples of a batch."""

    def cut(value: Any) -> Any:
        return change_tensors(value, lambda x: x[rows])

    return FusionContext(
        valid=context.valid[:, rows],
        targets=cut(context.targets),
        student=cut(context.student),
        hidden=cut(context.hidden),
        tasks=None if context.tasks is None else context.tasks[rows],
    )


def _reverse_teachers(context: FusionContext) -> FusionContext:
    """Return the context with the teachers from last to first."""
    return replace(context, valid=context.valid.flip(0), targets=context.targets[::-1])
