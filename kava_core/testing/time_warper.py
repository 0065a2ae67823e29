"""``t_time → time``, plus validity."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from kava_core.kv.timeline import Timeline
from kava_core.kv.timemap import TimeMap
from kava_core.testing.component import ComponentTests
from kava_core.testing.geometries import Sides
from kava_core.testing.require import require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import draw
from kava_core.testing.timelines import Side, timeline

Timelines = tuple[Timeline, Timeline]


class TimeWarperTests(ComponentTests):
    """The contract of ``kava_core.protocols.TimeWarper``."""

    kind: ClassVar[str] = "time_warper"

    lengths: ClassVar[tuple[tuple[int, int], ...]] = (
        (9, 5),
        (6, 6),
        (4, 11),
        (1, 5),
        (5, 1),
        (1, 1),
        (0, 3),
        (3, 0),
    )
    """Positions of teacher and student; override where only some fit."""

    paddings: ClassVar[tuple[tuple[Side, Side], ...]] = (
        *(("right", "right"), ("left", "left"), ("left", "right"), ("right", "left")),
    )
    """Where padding stands in the teacher and in the student."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Also once for each pair of lengths."""
        super().pytest_generate_tests(metafunc)
        if "length" in metafunc.fixturenames:
            metafunc.parametrize("length", self.lengths, ids=[f"{t}to{s}" for t, s in self.lengths])

    def timelines(
        self, length: tuple[int, int], padding: tuple[Side, Side] = ("right", "right"), extra: int = 0
    ) -> Timelines:
        """Four examples: full, half full, without a teacher's token, without a student's token.

        ``extra`` positions of padding are added on both sides.
        """
        t_time, time = length
        t_tokens, tokens = (t_time, (t_time + 1) // 2, 0, t_time), (time, (time + 1) // 2, time, 0)
        return (
            timeline(t_tokens, t_time + extra, padding=padding[0]),
            timeline(tokens, time + extra, padding=padding[1]),
        )

    def inputs(self, config: Any, sides: Sides) -> list[Timelines]:
        """One batch for each pair of lengths."""
        return [self.timelines(length) for length in self.lengths]

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Matrices and validity."""
        maps = [(component(*pair), pair[0].mask.shape[1]) for pair in inputs]
        return [tensor for one, t_time in maps for tensor in (one.dense(t_time), one.valid)]

    def test_axes(self, config: Any, length: tuple[int, int]) -> None:
        """A TimeMap whose validity has the student's extents and holds real positions only."""
        component = self.build(config, self.usual)
        for padding in self.paddings:
            teacher, student = self.timelines(length, padding, extra=2)
            time_map = component(teacher, student)
            kind = type(time_map).__name__
            require(
                isinstance(time_map, TimeMap), "a time warper must return a TimeMap", f"it returned {kind}"
            )
            valid = require_tensor(time_map.valid, tuple(student.mask.shape), "batch time", "validity")
            require(valid.dtype == torch.bool, "validity must be bool", f"it is {valid.dtype}")
            padded = int((valid & ~student.mask).sum())
            require(padded == 0, "the student's padding must not be valid", f"{padded} positions are")

    def test_rows_are_means(self, config: Any, length: tuple[int, int]) -> None:
        """Valid positions read real teacher positions with weights that sum to 1; others read nothing."""
        component = self.build(config, self.usual)
        for padding in self.paddings:
            teacher, student = self.timelines(length, padding, extra=2)
            time_map = component(teacher, student)
            matrix = self._matrix(time_map, teacher, student)
            require_finite(matrix, "weights must be finite")
            require(bool((matrix >= 0).all()), "weights must be at least 0", "some are not")
            wrong = (matrix.sum(2) - time_map.valid.double()).abs() > 1e-4
            told = f"{int(wrong.sum())} rows do not"
            require(
                not bool(wrong.any()), "weights must sum to 1 at valid positions and to 0 elsewhere", told
            )
            read = float(matrix.sum(1)[~teacher.mask].sum())
            require(abs(read) < 1e-6, "the teacher's padding must have weight 0", f"it has {read:.3g} in all")

    def test_padding_has_no_influence(self, config: Any, length: tuple[int, int]) -> None:
        """Real positions map alike wherever padding stands, and however much of it."""
        component = self.build(config, self.usual)
        wanted = self._real(component, self.timelines(length, self.paddings[0]))
        for padding, extra in product(self.paddings, (0, 3)):
            seen = self._real(component, self.timelines(length, padding, extra))
            for one, other in zip(seen, wanted, strict=True):
                contract = "real positions must be mapped alike whatever padding there is"
                require_same(one, other, f"{contract} (here {extra} more, {'/'.join(padding)})")

    def test_examples_are_independent(self, config: Any, length: tuple[int, int]) -> None:
        """An example alone gives what it gives in a batch."""
        component, (teacher, student) = self.build(config, self.usual), self.timelines(length)
        together = self._matrix(component(teacher, student), teacher, student)
        for row in range(together.shape[0]):
            alone = (_row(teacher, row), _row(student, row))
            seen = self._matrix(component(*alone), *alone)
            contract = "an example must not depend on the others of its batch"
            require_same(seen, together[row : row + 1], contract)

    def test_apply_is_the_matrix(self, config: Any, length: tuple[int, int]) -> None:
        """The map does to a cache what its matrix says; padding may hold NaN."""
        teacher, student = self.timelines(length, extra=2)
        time_map = self.build(config, self.usual)(teacher, student)
        matrix = self._matrix(time_map, teacher, student)
        x = draw(matrix.shape[0], 2, 2, matrix.shape[2], 3, dtype=torch.float64)
        wanted = torch.einsum("bij,blhjd->blhid", matrix, x)
        x = torch.where(teacher.mask[:, None, None, :, None], x, torch.nan)
        seen = time_map.apply(x)
        live = time_map.valid[:, None, None, :, None]
        contract = "applying the map must give the weighted means, untouched by padding"
        require_same(torch.where(live, seen, 0), torch.where(live, wanted, 0), contract)

    def _matrix(self, time_map: TimeMap, teacher: Timeline, student: Timeline) -> Tensor:
        t_time = teacher.mask.shape[1]
        shape = (*student.mask.shape, t_time)
        return require_tensor(time_map.dense(t_time), shape, "batch time t_time", "the map's matrix").double()

    def _real(self, component: Any, pair: Timelines) -> list[Tensor]:
        """For each example the matrix between real positions."""
        teacher, student = pair
        matrix = self._matrix(component(teacher, student), teacher, student)
        return [
            rows[mine][:, theirs]
            for rows, mine, theirs in zip(matrix, student.mask, teacher.mask, strict=True)
        ]


def _row(one: Timeline, row: int) -> Timeline:
    rows = slice(row, row + 1)
    return Timeline(one.mask[rows], one.positions[rows], one.segments[rows], one.spans[rows])
