"""Test time warpers: ``t_time → time``, plus validity."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.align.boundaries import plan_time
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import REASONING, Timeline
from kava_core.testing.component import ComponentTests
from kava_core.testing.geometries import Sides
from kava_core.testing.require import require, require_finite, require_same, require_tensor
from kava_core.testing.tensors import draw_cache, draw_normal
from kava_core.testing.timelines import Side, timeline

TimelinePair = tuple[Timeline, Timeline]


class TimeWarperTests(ComponentTests):
    """The contract of ``kava_core.protocols.time_warper.TimeWarper``, and of ``Evictor`` if it is offered.

    An evictor's map reads slots, of which there are as many as the student has positions.
    """

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
    """Positions of teacher and student; override if only some fit."""

    paddings: ClassVar[tuple[tuple[Side, Side], ...]] = (
        *(("right", "right"), ("left", "left"), ("left", "right"), ("right", "left")),
    )
    """Sides of the padding in the teacher and in the student."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run tests also once for each pair of lengths."""
        super().pytest_generate_tests(metafunc)
        if "length" in metafunc.fixturenames:
            metafunc.parametrize("length", self.lengths, ids=[f"{t}to{s}" for t, s in self.lengths])

    def timelines(
        self, length: tuple[int, int], padding: tuple[Side, Side] = ("right", "right"), extra: int = 0
    ) -> TimelinePair:
        """Return timelines of four examples: full, half full, without teacher tokens, without student tokens.

        ``extra`` positions of padding are added on both sides.
        """
        t_time, time = length
        t_tokens, tokens = (t_time, (t_time + 1) // 2, 0, t_time), (time, (time + 1) // 2, time, 0)
        return (
            timeline(t_tokens, t_time + extra, padding=padding[0]),
            timeline(tokens, time + extra, padding=padding[1]),
        )

    def inputs(self, config: Any, sides: Sides) -> list[TimelinePair]:
        """Return one batch for each pair of lengths."""
        return [self.timelines(length) for length in self.lengths]

    def outputs(self, component: Any, inputs: Any) -> list[Tensor]:
        """Return matrices and validity."""
        tensors = []
        for teacher, student in inputs:
            time_map = component(teacher, student)
            t_time = _readable_positions(component, teacher, student).shape[1]
            tensors += [time_map.dense(t_time), time_map.valid]
        return tensors

    def test_axes(self, config: Any, length: tuple[int, int]) -> None:
        """Check for a TimeMap whose validity has the student's extents and holds real positions only."""
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

    def test_border_accepts_the_map(self, config: Any, length: tuple[int, int]) -> None:
        """Check what kava checks in every run: starts, indices inside their own example, real positions."""
        component = self.build(config, self.usual)
        for padding in self.paddings:
            teacher, student = self.timelines(length, padding, extra=2)
            try:
                plan_time(component, teacher, student)
            except KavaError as error:
                require(False, "kava must accept the map at its border", str(error))

    def test_rows_are_means(self, config: Any, length: tuple[int, int]) -> None:
        """Check that valid positions read real ones with weights that sum to 1, and others nothing."""
        component = self.build(config, self.usual)
        for padding in self.paddings:
            teacher, student = self.timelines(length, padding, extra=2)
            time_map = component(teacher, student)
            readable = _readable_positions(component, teacher, student)
            matrix = self._checked_matrix(time_map, student, readable.shape[1])
            require_finite(matrix, "weights must be finite")
            require(bool((matrix >= 0).all()), "weights must be at least 0", "some are not")
            wrong = (matrix.sum(2) - time_map.valid.double()).abs() > 1e-4
            contract = "weights must sum to 1 at valid positions and to 0 elsewhere"
            require(not bool(wrong.any()), contract, f"{int(wrong.sum())} rows do not")
            read = float(matrix.sum(1)[~readable].sum())
            require(abs(read) < 1e-6, "the teacher's padding must have weight 0", f"it has {read:.3g} in all")

    def test_padding_has_no_influence(self, config: Any, length: tuple[int, int]) -> None:
        """Check that real positions map alike wherever padding is, and however much of it."""
        component = self.build(config, self.usual)
        wanted = self._matrices_of_real_tokens(component, self.timelines(length, self.paddings[0]))
        for padding, extra in product(self.paddings, (0, 3)):
            seen = self._matrices_of_real_tokens(component, self.timelines(length, padding, extra))
            for one, other in zip(seen, wanted, strict=True):
                contract = "real positions must be mapped alike whatever padding there is"
                require_same(one, other, f"{contract} (here {extra} more, {'/'.join(padding)})")

    def test_examples_are_independent(self, config: Any, length: tuple[int, int]) -> None:
        """Check that an example alone gives what it gives in a batch."""
        component, (teacher, student) = self.build(config, self.usual), self.timelines(length)
        columns = _readable_positions(component, teacher, student).shape[1]
        together = self._checked_matrix(component(teacher, student), student, columns)
        for row in range(together.shape[0]):
            alone = (_cut_example(teacher, row), _cut_example(student, row))
            seen = self._checked_matrix(component(*alone), alone[1], columns)
            contract = "an example must not depend on the others of its batch"
            require_same(seen, together[row : row + 1], contract)

    def test_apply_is_the_matrix(self, config: Any, length: tuple[int, int]) -> None:
        """Check that the map does to a cache what its matrix says; padding may hold NaN."""
        teacher, student = self.timelines(length, extra=2)
        component = self.build(config, self.usual)
        time_map, readable = component(teacher, student), _readable_positions(component, teacher, student)
        matrix = self._checked_matrix(time_map, student, readable.shape[1])
        x = draw_normal(matrix.shape[0], 2, 2, matrix.shape[2], 3, dtype=torch.float64)
        wanted = torch.einsum("bij,blhjd->blhid", matrix, x)
        x = torch.where(readable[:, None, None, :, None], x, torch.nan)
        seen = time_map.apply(x)
        live = time_map.valid[:, None, None, :, None]
        contract = "applying the map must give the weighted means, untouched by padding"
        require_same(torch.where(live, seen, 0), torch.where(live, wanted, 0), contract)

    def test_evictions_are_reasoning_tokens(self, config: Any, length: tuple[int, int]) -> None:
        """Check that filled slots name different reasoning tokens, in time order."""
        for evictor, teacher in self._evictor_and_timelines(config, length):
            position, kept = (
                self._chosen_positions(evictor, teacher, length[1]),
                _filled_slots(teacher, length[1]),
            )
            inside = (position >= 0) & (position < teacher.mask.shape[1])
            require(bool(inside.all()), "every slot must name a position of the teacher", "some do not")
            reasoning = (teacher.segments == REASONING)[:, None, None].expand(*position.shape[:3], -1)
            wrong = int((kept & ~reasoning.gather(3, position)).sum())
            require(wrong == 0, "filled slots must name reasoning tokens", f"{wrong} do not")
            back = int((kept[..., 1:] & (position.diff(dim=3) <= 0)).sum())
            require(back == 0, "filled slots must be in time order, each token once", f"{back} are not")

    def test_evictions_ignore_padding(self, config: Any, length: tuple[int, int]) -> None:
        """Check that the same tokens are kept whatever the padding, unless they are drawn at random."""
        wanted: list[Tensor] = []
        for evictor, teacher in self._evictor_and_timelines(config, length):
            position, kept = (
                self._chosen_positions(evictor, teacher, length[1]),
                _filled_slots(teacher, length[1]),
            )
            if not torch.equal(position, self._chosen_positions(evictor, teacher, length[1], seed=1)):
                return
            start = (teacher.mask.cumsum(1) == 0).sum(1)[:, None, None, None]
            wanted.append(torch.where(kept, position - start, -1))
            contract = "padding must not change what is kept, on either side, whatever it holds"
            require_same(wanted[-1], wanted[0], contract)

    def _evictor_and_timelines(
        self, config: Any, length: tuple[int, int]
    ) -> Iterator[tuple[Evictor, Timeline]]:
        """Yield the component, if it evicts, with timelines that are padded on either side."""
        component = self.build(config, self.usual)
        for side in dict.fromkeys(theirs for theirs, _ in self.paddings):
            if isinstance(component, Evictor):
                yield component, self.timelines(length, (side, "right"), extra=2)[0]

    def _chosen_positions(self, evictor: Evictor, teacher: Timeline, count: int, seed: int = 0) -> Tensor:
        """Return what it keeps of a cache in which a token is the same wherever the padding is."""
        geometry = self.usual.teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            position = evictor.choose(_cache_by_token(teacher, evictor.reads, geometry), teacher, count)
        shape = (teacher.mask.shape[0], geometry.layer, geometry.head, count)
        return require_tensor(position, shape, "batch t_layer t_head slot", "choose")

    def _checked_matrix(self, time_map: TimeMap, student: Timeline, t_time: int) -> Tensor:
        shape = (*student.mask.shape, t_time)
        return require_tensor(time_map.dense(t_time), shape, "batch time t_time", "the map's matrix").double()

    def _matrices_of_real_tokens(self, component: Any, pair: TimelinePair) -> list[Tensor]:
        """Return for each example the matrix between real positions."""
        teacher, student = pair
        readable = _readable_positions(component, teacher, student)
        matrix = self._checked_matrix(component(teacher, student), student, readable.shape[1])
        matrices = []
        for example, is_real, is_readable in zip(matrix, student.mask, readable, strict=True):
            matrices.append(example[is_real][:, is_readable])
        return matrices


def _readable_positions(component: Any, teacher: Timeline, student: Timeline) -> Tensor:
    """Return ``batch t_time``: whether the map may read a position of the teacher, or a slot."""
    if not isinstance(component, Evictor):
        return teacher.mask
    count = student.mask.shape[1]
    return (_filled_slots(teacher, count) & _filled_slots(student, count))[:, 0, 0]


def _filled_slots(teacher: Timeline, count: int) -> Tensor:
    """Return ``batch 1 1 slot``: whether there is a reasoning token for a slot."""
    tokens = (teacher.segments == REASONING).sum(1)
    return torch.arange(count, device=tokens.device) < tokens[:, None, None, None]


def _cache_by_token(teacher: Timeline, parts: tuple[Part, ...], geometry: Geometry) -> Cache:
    """Draw numbers that depend on the example and on the token's place in its text alone; NaN at padding."""
    batch, time = teacher.mask.shape
    drawn = draw_cache(geometry, parts or ("keys",), batch=batch, time=max(time, 1))
    index = teacher.positions[:, None, None, :, None]
    real = teacher.mask[:, None, None, :, None]
    return drawn.map(lambda x, _: torch.where(real, x.take_along_dim(index, 3), torch.nan))


def _cut_example(one: Timeline, row: int) -> Timeline:
    rows = slice(row, row + 1)
    return Timeline(one.mask[rows], one.positions[rows], one.segments[rows], one.spans[rows])
