"""Distil hidden states: a teacher's are aligned to the student's as a cache of one head, and compared.

Source: FitNets (arXiv 1412.6550), Patient KD (arXiv 1908.09355), TinyBERT (arXiv 1909.10351, equation 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.distill.denominators import TOKENS, teacher_shares
from kava_core.distill.teachers import Side, time_map_of
from kava_core.errors import UnsupportedModelError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.maths.masks import (
    live,
    scaled_difference,
    select,
    weighted_sum,
    widen,
    without_autocast,
)
from kava_core.models.teacher import TeacherPass
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.losses import HiddenSpec

HIDDEN = "hidden"
"""Name of the term."""

HiddenStates = Sequence[Float[Tensor, "batch time hidden"]]
"""What transformers returns: the embedding, then the output of every layer."""


class AlignedStates(nn.Module):
    """The term of hidden states, with what aligns every teacher's.

    States are the ``values`` of a cache with one head, as wide as the hidden state: so every component of an
    alignment takes them.

    Args:
        spec: what is compared, and how much each teacher counts.
        aligners: one for every teacher that takes part.
        student_places: places of the compared layers' outputs among the student's hidden states.
        teacher_places: of the outputs that each aligner reads, by the teacher's name.
    """

    def __init__(
        self,
        spec: HiddenSpec,
        aligners: Sequence[TeacherAligner],
        *,
        student_places: Sequence[int],
        teacher_places: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.aligners = nn.ModuleList(aligners)
        self._student_places = tuple(student_places)
        self._teacher_places = {name: tuple(places) for name, places in teacher_places.items()}

    @property
    def teachers(self) -> list[TeacherAligner]:
        """Return the aligners, in the spec's order of teachers."""
        return [aligner for aligner in self.aligners if isinstance(aligner, TeacherAligner)]

    @property
    def layers(self) -> int:
        """Return how many of the student's layers are compared."""
        return len(self._student_places)

    @property
    def wants_calibration(self) -> bool:
        """Return whether a projector must see data before training."""
        return any(aligner.wants_calibration for aligner in self.teachers)

    def student_states(self, hidden_states: HiddenStates) -> Cache:
        """Return the compared layers of the student, ``batch layer 1 time hidden``."""
        return stacked_states(hidden_states, self._student_places, who="student")

    def teacher_states(self, teacher: str, hidden_states: HiddenStates) -> Cache:
        """Return the layers of a teacher that its aligner reads, ``batch t_layer 1 t_time hidden``."""
        return stacked_states(hidden_states, self._teacher_places[teacher], who=f"teacher {teacher!r}")

    def forward(
        self,
        student: Cache,
        passes: Sequence[TeacherPass],
        sides: Mapping[str, Side],
        timeline: Timeline,
        denominators: Float[Tensor, "4"],
    ) -> Float[Tensor, ""]:
        """Return the mean distance over the student's tokens, layers, and the teachers that ran.

        Positions without a target add 0.

        Args:
            student: ``student_states`` of this forward pass.
            passes: of the teachers that ran, with their hidden states.
            sides: every teacher's side of the batch, by name.
            timeline: the student's positions.
            denominators: of the whole batch.
        """
        tokens = denominators[TOKENS]
        states_of = {given.teacher: given.hidden_states for given in passes if given.hidden_states}
        shares = teacher_shares(self.spec, states_of)
        addends = [torch.zeros_like(tokens)]
        for aligner in self.teachers:
            if aligner.name not in shares:
                addends += _zeros_of_weights(aligner)
                continue
            states = self.teacher_states(aligner.name, states_of[aligner.name])
            time_map = time_map_of(aligner, sides[aligner.name], timeline)
            with without_autocast(tokens.device):
                distance = self.distance(aligner, student, _moved(states, tokens.device), time_map)
            addends.append(distance * shares[aligner.name] / tokens)
        return torch.stack(addends).sum()

    def distance(
        self, aligner: TeacherAligner, student: Cache, teacher: Cache, time_map: TimeMap
    ) -> Float[Tensor, ""]:
        """Return the distance from one teacher, summed over positions, as a mean over layers.

        Args:
            aligner: the teacher's.
            student: ``student_states``.
            teacher: ``teacher_states``.
            time_map: of the batch.
        """
        target = aligner.align(teacher.map(part_at_least_float32), time_map).any
        view = aligner.view_of(student.map(part_at_least_float32)).any
        layers = view.shape[1]
        weight = (time_map.valid.to(view.dtype) / layers)[:, None].expand(-1, layers, -1)
        if self.spec.compare == "mse":
            return weighted_sum(scaled_difference(view, target, weight, "example").square(), weight)
        return _cosine_distance(view, target, weight)

    @torch.no_grad()
    def observe(self, student: Cache, teacher: TeacherPass, side: Side, timeline: Timeline) -> None:
        """Show one batch to the projector of one teacher, if it must see data before training.

        Args:
            student: ``student_states`` in evaluation mode.
            teacher: the teacher's pass, with its hidden states.
            side: the teacher's side of the batch.
            timeline: the student's positions.
        """
        aligner = next(aligner for aligner in self.teachers if aligner.name == teacher.teacher)
        assert teacher.hidden_states is not None
        states = self.teacher_states(aligner.name, teacher.hidden_states)
        states = _moved(states, timeline.mask.device).map(part_at_least_float32)
        aligner.observe(states, student.map(part_at_least_float32), time_map_of(aligner, side, timeline))

    def finish_calibration(self) -> None:
        """Compute every calibrated projection from what was observed."""
        for aligner in self.teachers:
            if aligner.wants_calibration:
                aligner.finish_calibration()


def stacked_states(hidden_states: HiddenStates, places: Sequence[int], *, who: str) -> Cache:
    """Return chosen hidden states as the values of a cache with one head.

    Raises:
        UnsupportedModelError: the model returned too few of them.
    """
    if len(hidden_states) <= max(places):
        raise UnsupportedModelError(
            f"hidden: {who} returns {len(hidden_states)} hidden states, not one for every layer"
        )
    states = torch.stack([hidden_states[place] for place in places], 1)
    return Cache(values=rearrange(states, "batch layer time dim -> batch layer 1 time dim"))


def _moved(states: Cache, device: torch.device) -> Cache:
    return states.map(lambda x, _: x.to(device))


def _cosine_distance(
    view: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    weight: Float[Tensor, "batch layer time"],
) -> Float[Tensor, ""]:
    """Return the sum over positions and layers of weight × (1 − cosine), a mean over heads."""
    where = live(weight)
    cosine = F.cosine_similarity(select(widen(view), where), select(widen(target), where), dim=-1)
    return weighted_sum(1 - cosine[..., None], weight)


def _zeros_of_weights(module: nn.Module) -> list[Tensor]:
    """Return zeros with a gradient to every trained weight, which distributed training waits for."""
    return [0 * weight.sum() for weight in module.parameters() if weight.requires_grad]
