"""Student, aligners, fuser and losses in one module with one forward pass. Teachers stay outside.

Everything that has gradients runs inside the one wrapped forward, so that DDP, FSDP and resuming see all
of it; teachers are held where ``nn.Module`` does not look, so that nothing trains, saves or wraps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kava_core.kv.capture import Capture
from kava_core.kv.masks import without_autocast
from kava_core.kv.pipeline import Aligned, KVPipeline
from kava_core.kv.timeline import Timeline
from kava_core.train.teacher import Teacher

IGNORED = -100
"""Label of positions without cross-entropy, as in transformers."""


def cross_entropy(
    logits: Float[Tensor, "batch time vocab"], labels: Int[Tensor, "batch time"], items: Tensor
) -> Float[Tensor, ""]:
    """Summed next-token cross-entropy of the labelled positions, divided by ``items``, in float32."""
    return (
        F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        / items
    )


class Distiller(nn.Module):
    """What the trainer trains.

    Args:
        student: a causal language model of transformers, possibly with adapters.
        pipeline: alignment, fusion and KV losses; None trains on cross-entropy alone.
        teachers: one for each aligner of the pipeline.
        rotary: whether the student's keys and queries are compared without their rotation.
    """

    main_input_name = "student"
    supports_gradient_checkpointing = True

    def __init__(
        self,
        student: nn.Module,
        pipeline: KVPipeline | None = None,
        teachers: Sequence[Teacher] = (),
        **capture: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self.config = student.config
        self.pipeline = pipeline
        self.__dict__["teachers"] = tuple(teachers)
        self.__dict__["capture"] = (
            None if pipeline is None else Capture(student, layers=pipeline.layers, **capture)
        )

    def forward(
        self, student: Mapping[str, Tensor], teachers: Mapping[str, Mapping[str, Tensor]], items: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            student: the collator's tensors of the student's side.
            teachers: the same for every teacher, by name.
            items: Float ``2``: labelled positions and real tokens of the whole batch.

        Returns:
            ``loss`` (cross-entropy + Σ λ · term), and detached ``ce`` and every KV term.
        """
        if self.pipeline is None:
            ce = self._student(student, items[0])
            return {"loss": ce, "ce": ce.detach()}
        timeline = Timeline.from_batch(student)
        aligned = self._aligned(teachers, timeline)
        with self.__dict__["capture"]:
            ce = self._student(student, items[0])
        with without_autocast(ce.device):
            terms = self.pipeline.terms_of(self.__dict__["capture"].take(), aligned, timeline, items[1])
            loss = ce + self.pipeline.total(terms)
        return {"loss": loss, "ce": ce.detach(), **{name: term.detach() for name, term in terms.items()}}

    def _aligned(self, teachers: Mapping[str, Mapping[str, Tensor]], timeline: Timeline) -> list[Aligned]:
        """Every teacher's target; only one raw cache is alive at a time."""
        assert self.pipeline is not None
        aligned = []
        for aligner, teacher in zip(self.pipeline.teachers, self.__dict__["teachers"], strict=True):
            side = teachers[teacher.name]
            cache = teacher.cache(side)
            with without_autocast(timeline.mask.device):
                aligned.append(self.pipeline.align(aligner, cache, Timeline.from_batch(side), timeline))
            del cache
        return aligned

    def _student(self, side: Mapping[str, Tensor], items: Tensor) -> Float[Tensor, ""]:
        logits = self.student(
            input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False
        ).logits
        return cross_entropy(logits, side["labels"], items)

    def place_teachers(self, device: torch.device) -> None:
        """Move the teachers to the device of the batches."""
        for teacher in self.__dict__["teachers"]:
            teacher.to(device)

    @torch.no_grad()
    def calibrate(self, batch: Mapping[str, Any]) -> None:
        """Show one batch of the teachers' caches to every projector that wants to see data."""
        assert self.pipeline is not None
        timeline = Timeline.from_batch(batch["student"])
        for aligner, teacher in zip(self.pipeline.teachers, self.__dict__["teachers"], strict=True):
            if aligner.wants_calibration:
                side = batch["teachers"][teacher.name]
                cache = teacher.cache(side).map(lambda x, _: x.float())
                aligner.observe(cache, aligner.plan(Timeline.from_batch(side), timeline))

    def finish_calibration(self) -> None:
        """Compute every calibrated projection from what was observed."""
        assert self.pipeline is not None
        for aligner in self.pipeline.teachers:
            if aligner.wants_calibration:
                aligner.dim_projector.finish()
