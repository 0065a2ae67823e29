"""Distil next-token distributions of teachers that have the student's vocabulary.

Source: Hinton et al. 2015 (arXiv 1503.02531): the divergence of softened distributions × the squared
temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedTokenizerBase

from kava_core.data.encoding.encode import NO_LABEL
from kava_core.distill.denominators import LABELLED
from kava_core.distill.formed_gradient import gradient_buffer, keep_gradient, scaled_gradient
from kava_core.errors import SpecError
from kava_core.models.teacher import TeacherPass
from kava_core.protocols.timeline import PROMPT
from kava_core.specfile.sections.losses import DivergenceKind, LogitsSpec

LOGITS = "logits"
"""Name of the term."""

ELEMENTS = 2**22
"""Most logits of one side that are compared at once."""

Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def assert_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, who: str
) -> None:
    """Check that two tokenizers number the same tokens alike.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        who: how the error names the teacher.

    Raises:
        SpecError: they do not; the error names a token.
    """
    own, other = student.get_vocab(), teacher.get_vocab()
    if own == other:
        return
    token = min((t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=str)
    raise SpecError(
        f"logits: {who} has another vocabulary than the student: {len(other)} tokens and {len(own)}; token "
        f"{token!r} is {other.get(token, 'missing')} there and {own.get(token, 'missing')} here; name the "
        "teachers with the student's tokenizer in logits.teachers"
    )


def same_tokens(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Pair every student position with the teacher's position that predicts the same token.

    Completions are aligned by their first tokens, as the prompts may differ. A position counts if the student
    has a label for the token after it and both completions agree up to that token; if that token is in the
    prompt, the whole texts must agree so far.

    Args:
        student: the student's side of the batch.
        teacher: the teacher's side.

    Returns:
        The teacher's position for each student position, and whether the pair counts.
    """
    ids, labels = student["input_ids"], student["labels"]
    shift = _start(teacher) - _start(student)
    shifted = torch.arange(ids.shape[1], device=ids.device) + shift[:, None]
    last = teacher["input_ids"].shape[1] - 1
    positions = shifted.clamp(0, last)
    exists = (shifted >= 0) & (shifted <= last)
    real = teacher["attention_mask"].gather(1, positions).bool() & exists
    differs = (teacher["input_ids"].gather(1, positions) != ids) | ~real
    in_prompt = student["segments"] == PROMPT
    agrees = torch.where(
        in_prompt,
        (differs.long().cumsum(1) == 0) & (shift == 0)[:, None],
        (differs & ~in_prompt).long().cumsum(1) == 0,
    )
    counts = torch.zeros_like(agrees)
    counts[:, :-1] = (agrees & (labels != NO_LABEL))[:, 1:] & real[:, :-1]
    return positions, counts


def _start(side: Mapping[str, Tensor]) -> Int[Tensor, " batch"]:
    """Return where each completion begins."""
    return (side["segments"] == PROMPT).sum(1)


def logit_term(
    logits: Float[Tensor, "batch time vocab"],
    passes: Sequence[TeacherPass],
    student: Mapping[str, Tensor],
    teachers: Mapping[str, Mapping[str, Any]],
    denominators: Float[Tensor, "4"],
    spec: LogitsSpec,
) -> Float[Tensor, ""]:
    """Return the mean divergence over labelled tokens and over the teachers that ran with their logits kept.

    Args:
        logits: the student's.
        passes: of the teachers that ran.
        student: the student's side of the batch.
        teachers: every teacher's side, by name.
        denominators: of the whole batch.
        spec: temperature and kind of the divergence.
    """
    with_logits = [given for given in passes if given.logits is not None and _takes_part(given, spec)]
    labelled = denominators[LABELLED]
    addends = [torch.zeros_like(labelled)]
    for teacher_pass in with_logits:
        assert teacher_pass.logits is not None
        positions, counts = same_tokens(student, teachers[teacher_pass.teacher])
        addends.append(
            logit_divergence(
                logits,
                teacher_pass.logits.to(logits.device),
                positions,
                counts / (labelled * len(with_logits)),
                temperature=spec.temperature,
                kind=spec.kind,
            )
        )
    return torch.stack(addends).sum()


def _takes_part(teacher_pass: TeacherPass, spec: LogitsSpec) -> bool:
    """Return whether a teacher's logits are distilled here; another term may have asked for them."""
    return spec.teachers is None or teacher_pass.teacher in spec.teachers


def logit_divergence(
    student: Float[Tensor, "batch time vocab"],
    teacher: Float[Tensor, "batch t_time _"],
    places: Int[Tensor, "batch time"],
    weight: Float[Tensor, "batch time"],
    *,
    temperature: float = 1.0,
    kind: DivergenceKind = "forward",
) -> Float[Tensor, ""]:
    """Return the weighted sum of divergences of the softened distributions, times temperature².

    Over positions of weight > 0, and over the tokens both sides have (padding of an embedding is left out),
    in float32 at least. Computed by blocks of positions, whose gradient is formed on the way, so that only it
    is kept. Gradients reach ``student`` alone.

    Args:
        student: the student's logits.
        teacher: the teacher's logits.
        places: for each student position the teacher's that predicts the same token.
        weight: of each student position.
        temperature: by which logits are divided.
        kind: ``forward``: KL(teacher ‖ student); ``reverse``: KL(student ‖ teacher); ``jeffreys``: their sum.
    """
    total: Tensor = _Divergence.apply(student, teacher, places, weight, temperature, _KINDS[kind])  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        student, teacher, places, weight, temperature, compare = arguments
        width = min(student.shape[-1], teacher.shape[-1])
        rows = places + torch.arange(len(places), device=places.device)[:, None] * teacher.shape[1]
        own, other = student.flatten(0, 1), teacher.flatten(0, 1)
        gradient = gradient_buffer(own, wanted=ctx.needs_input_grad[0])
        total = torch.zeros((), dtype=torch.promote_types(own.dtype, torch.float32), device=own.device)
        for block in torch.arange(len(own), device=own.device).split(max(1, ELEMENTS // width)):
            weights = weight.flatten()[block].to(total.dtype)
            pair = (own[block, :width], other[rows.flatten()[block], :width])
            q, p = (torch.log_softmax(x.to(total.dtype) / temperature, -1) for x in pair)
            each, slope = compare(q, p)
            live = weights != 0
            total += torch.where(live, each * weights, 0).sum() * temperature**2
            if gradient is not None:
                scaled = torch.where(live[:, None], slope * weights[:, None] * temperature, 0)
                gradient[block, :width] = scaled.to(gradient.dtype)
        keep_gradient(ctx, gradient, student)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return scaled_gradient(ctx, gradient), *(None,) * 5


def _forward(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) of every row of log-probabilities, and its derivative by the logits of q."""
    chance = p.exp()
    return torch.where(chance > 0, chance * (p - q), 0).sum(-1), q.exp() - chance


def _reverse(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    chance = q.exp()
    ratio = torch.where(chance > 0, q - p, 0)
    each = (chance * ratio).sum(-1)
    return each, chance * (ratio - each[:, None])


def _jeffreys(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    both = _forward(q, p), _reverse(q, p)
    return both[0][0] + both[1][0], both[0][1] + both[1][1]


_KINDS: dict[str, Compare] = {"forward": _forward, "reverse": _reverse, "jeffreys": _jeffreys}
